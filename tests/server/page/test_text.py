"""From a model's text to what is shown of it: Markdown, and the colours of code. Nothing of it can run."""

from __future__ import annotations

import pytest

from tests.server.page.visit import Visit

pytestmark = pytest.mark.slow

MARKDOWN = [
    ("a **b** *c* _d_ ~~e~~", "<p>a <strong>b</strong> <em>c</em> <em>d</em> <s>e</s></p>"),
    ("2 * 3 * 4 and snake_case_name", "<p>2 * 3 * 4 and snake_case_name</p>"),
    ("# One\ntext", "<h3>One</h3><p>text</p>"),
    ("a ``b ` c`` d", "<p>a <code>b ` c</code> d</p>"),
    ("- a\n  - b\n- c", "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>"),
    ("3. a\n4. **b**", '<ol start="3"><li>a</li><li><strong>b</strong></li></ol>'),
    ("> quoted\n> - x", "<blockquote><p>quoted</p><ul><li>x</li></ul></blockquote>"),
    ("so:\n- a", "<p>so:</p><ul><li>a</li></ul>"),
    ("---", "<hr>"),
    ("1. a\n\n2. b", '<ol start="1"><li><p>a</p></li><li><p>b</p></li></ol>'),
    ("- a\n\n  b\n- c", "<ul><li><p>a</p><p>b</p></li><li>c</li></ul>"),
    (
        "1. a\n  - b\n    - c\n2. d",
        '<ol start="1"><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ol>',
    ),
    ("- a\nb\n\nc", "<ul><li>a\nb</li></ul><p>c</p>"),
    ("- a\n1. b", '<ul><li>a</li></ul><ol start="1"><li>b</li></ol>'),
    ("in 1999\n2000. was new", "<p>in 1999\n2000. was new</p>"),
    (
        "- [ ] a\n- [x] b **c**\n- [y] d",
        '<ul><li class="task"><input type="checkbox" disabled="">a</li>'
        '<li class="task"><input type="checkbox" disabled="" checked="">b <strong>c</strong></li>'
        "<li>[y] d</li></ul>",
    ),
    (
        "so:\n| a | b |\n|:-:|--:|\n| `1 \\| 2` | **c** | no |\n| x<br>y",
        '<p>so:</p><div class="wide" tabindex="0"><table><thead><tr><th class="center">a</th>'
        '<th class="right">b</th></tr></thead><tbody><tr><td class="center"><code>1 | 2</code></td>'
        '<td class="right"><strong>c</strong></td></tr><tr><td class="center">x<br>y</td>'
        '<td class="right"></td></tr></tbody></table></div>',
    ),
    ("a | b\n--- | --- | ---", "<p>a | b\n--- | --- | ---</p>"),
    (r"\*a\* \`b\` 1\. \(c\) \frac", r"<p>*a* `b` 1. \(c\) \frac</p>"),
    ("__a b__ and __init__.py x__y__z", "<p><strong>a b</strong> and __init__.py x__y__z</p>"),
    ("## a ##", "<h4>a</h4>"),
    (
        "[x](https://e.org/a_(b))",
        '<p><a href="https://e.org/a_(b)" rel="noopener noreferrer nofollow" target="_blank">x</a></p>',
    ),
    ("&lt;b&gt; <b>", "<p>&amp;lt;b&amp;gt; &lt;b&gt;</p>"),
    *[
        (f"[x]({bad})", f"<p>[x]({bad})</p>")
        for bad in (
            "javascript:alert(1)",
            "JaVaScRiPt:alert(1)",
            "data:text/html,x",
            "vbscript:x",
            "//evil.example",
            "/v1/models",
            "file:///etc/passwd",
            "blob:http://x/y",
        )
    ],
]


def test_markdown_becomes_nodes(visit: Visit) -> None:
    made = visit.page.evaluate(
        """async (texts) => {
            const { show } = await import("/page/markdown.js");
            return texts.map((text) => {
                const [whole, grown] = [document.createElement("div"), document.createElement("div")];
                show(whole, text);
                for (let end = 0; end <= text.length; end++) show(grown, text.slice(0, end));
                return [whole.innerHTML, grown.innerHTML];
            });
        }""",
        [text for text, _ in MARKDOWN],
    )
    for (text, html), (whole, grown) in zip(MARKDOWN, made, strict=True):
        assert whole == html, text
        assert grown == html, f"{text!r} letter by letter"


FENCED = """1. **Install** it:

   ```sh
   pip install x

     indented
   ```

2. Run it:

```python
```
~~~
```
never ended"""


def test_code_keeps_its_lines_wherever_it_stands(visit: Visit) -> None:
    """A fence in an item of a list was cut out of it, and the list begun anew after each empty line."""
    made = visit.page.evaluate(
        """async (text) => {
            const { show } = await import("/page/markdown.js");
            const box = document.createElement("div");
            show(box, text);
            const code = [...box.querySelectorAll("figure")].map((figure) => [
                figure.parentNode.nodeName,
                figure.querySelector("figcaption > span").textContent,
                figure.querySelector("pre").textContent,
            ]);
            return [box.querySelectorAll("ol").length, box.querySelectorAll("ol > li").length, code];
        }""",
        FENCED,
    )
    shown = [
        ["LI", "sh", "pip install x\n\n  indented"],
        ["DIV", "python", ""],
        ["DIV", "", "```\nnever ended"],
    ]
    assert made == [1, 2, shown]


COLOURED = [
    (
        "python",
        "@a\ndef f(x):  # say\n    return 'it' + f\"{x}\" + 0x1F + None",
        "name:@a keyword:def name:f comment:# say keyword:return string:'it' string:\"{x}\" "
        "number:0x1F keyword:None",
    ),
    ("py", '"""a\nb"""\nprint(1.5e3)', 'string:"""a\nb""" name:print number:1.5e3'),
    (
        "js",
        "let a = `x\n${1}`; /* b\n */ // c",
        "keyword:let string:`x\n${1}` comment:/* b\n */ comment:// c",
    ),
    ("rust", "fn f<'a>(x: &'a str) -> char { '\\n' }", "keyword:fn keyword:str keyword:char string:'\\n'"),
    (
        "bash",
        'if x --a; then echo "$b" # c\nfi',
        'keyword:if property:--a keyword:then keyword:echo string:"$b" comment:# c keyword:fi',
    ),
    ("json", '{"a": ["b", 1, true]}', 'property:"a" string:"b" number:1 keyword:true'),
    (
        "html",
        "<!-- a --><p class='b'>&amp;</p>",
        "comment:<!-- a --> keyword:<p property:class string:'b' keyword:> number:&amp; "
        "keyword:</p keyword:>",
    ),
    (
        "SQL",
        "SELECT a FROM b -- c\nWHERE d = 'it''s'",
        "keyword:SELECT keyword:FROM comment:-- c keyword:WHERE string:'it''s'",
    ),
    ("diff", "@@ 1 @@\n-a\n+b\n c", "keyword:@@ 1 @@ gone:-a added:+b"),
    ("yaml", "a:\n  - b: 1 # c", "property:a property:  - b number:1 comment:# c"),
    (
        "css",
        "a { color: #fff; margin: 2px } /* b",
        "property:color number:#fff property:margin number:2px comment:/* b",
    ),
    ("text", "if x: return 1", ""),
    ("constructor", "if x: return 1", ""),
]
HOSTILE_CODE = [
    '"',
    "'",
    "`",
    "\\",
    '\\"',
    "/*",
    "<!--",
    "<",
    "a",
    "a ",
    " ",
    "\n",
    "[",
    "- ",
    "#",
    "-",
    "--",
    "$",
    "${",
    "@",
    "&",
    "'\\",
    '"a" ',
    '"\\',
    "0",
    "0x",
    "a:",
    "a =",
    "漢",
    "\u2028",
]


def test_code_is_coloured_by_what_it_is(visit: Visit) -> None:
    made = visit.page.evaluate(
        """async (all) => {
            const { pieces } = await import("/page/highlight.js");
            return all.map(([language, text]) => pieces(text, language));
        }""",
        COLOURED,
    )
    for (language, text, expected), found in zip(COLOURED, made, strict=True):
        assert "".join(piece for _, piece in found) == text
        assert " ".join(f"{kind}:{piece}" for kind, piece in found if kind) == expected, language


def test_hostile_code_is_coloured_as_fast_as_any_other_and_stays_the_same(visit: Visit) -> None:
    """A pattern that tries all ways takes minutes for one of these; it gets 30,000 characters at most."""
    slow = visit.page.evaluate(
        """async ([names, marks]) => {
            const { pieces } = await import("/page/highlight.js");
            const slow = [];
            for (const name of names) {
                for (const mark of marks) {
                    const text = mark.repeat(30000 / mark.length);
                    const began = performance.now();
                    const found = pieces(text, name).map(([, piece]) => piece).join("");
                    if (performance.now() - began > 1000 || found !== text) slow.push([name, mark]);
                }
            }
            return slow;
        }""",
        [["c", "rust", "python", "sh", "json", "html", "css", "yaml", "sql", "diff"], HOSTILE_CODE],
    )
    assert not slow


def test_endless_marks_are_shown_all_the_same(visit: Visit) -> None:
    """Quotes in quotes without end filled the stack; a pattern that tries all ways would hang here."""
    marks = [
        "**a ",
        "`a ",
        "[a](b",
        "~~a",
        "_a ",
        "__a ",
        "*a ",
        "# #",
        "> " * 9 + "x ",
        "|-",
        "- x",
        "- a\n ",
        "1. a\n\n",
    ]
    marks += ["a|b\n-|-\n", "\\*", "<br", "```\n", "- [ ] ", "# ", "\n\n- ```\n", "  " * 9 + "- x\n"]
    missing = visit.page.evaluate(
        """async (marks) => {
            const { show } = await import("/page/markdown.js");
            return marks.filter((mark) => {
                const box = document.createElement("div");
                show(box, mark.repeat(4000));
                return box.textContent.length < 4000;
            });
        }""",
        marks,
    )
    assert not missing
