// Owns the colours of code: a text to pieces, each with its kind. Knows no element of the page.
//
// A language is a regular expression with a named group a kind; the first that matches wins, and what none
// matches is plain. No pattern can match in two ways, so that hostile code takes no longer than any other.

const MOST_CHARACTERS = 30_000; // more than that is left plain

const NUMBER = "(?<number>\\b(?:0[xXbBoO][\\da-fA-F_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)\\w*)";
const WORD = "(?<word>[A-Za-z_$][\\w$]*)";
const QUOTED = `"(?:[^"\\\\\\n]|\\\\[^])*"?`;
const SINGLE = `'(?:[^'\\\\\\n]|\\\\[^])*'?`;
const CHARACTER = `'(?:[^'\\\\\\n]|\\\\[^\\n']+|\\\\')'`; // where a lone ' is no string: lifetimes
const TEMPLATE = "`(?:[^`\\\\]|\\\\[^])*`?";
const BLOCK = "\\/\\*[^]*?(?:\\*\\/|$)";
const HASH = "(?<![\\w$&{])#[^\\n]*";

const comment = (...patterns) => `(?<comment>${patterns.join("|")})`;
const string = (...patterns) => `(?<string>${patterns.join("|")})`;
const words = (text) => new Set(text.split(" "));

const C_WORDS =
  "abstract alignas alignof and any as assert async auto await bool boolean break byte case catch char class const " +
  "constexpr continue debugger def default defer delete do double else enum explicit export extends extern final finally " +
  "float fn for foreach from func function go goto if implements import in inline instanceof int int8_t int16_t int32_t " +
  "int64_t interface internal let long mut namespace new noexcept not null nullptr operator or override package private " +
  "protected pub public readonly register return self short signed sizeof size_t static static_cast string struct super " +
  "switch template this throw throws trait try type typedef typename typeof uint8_t uint16_t uint32_t uint64_t undefined " +
  "union unsigned using var virtual void volatile while yield true false nil";
const RUST_WORDS =
  "as async await bool break char const continue crate dyn else enum extern f32 f64 false fn for i8 i16 i32 i64 if impl " +
  "in isize let loop match mod move mut pub ref return self Self static str String struct super trait true type u8 u16 " +
  "u32 u64 unsafe use usize where while data module import of then instance deriving case newtype";
const PYTHON_WORDS =
  "False None True and as assert async await break case class continue def del elif else except finally for from " +
  "global if import in is lambda match nonlocal not or pass raise return self try while with yield";
const SHELL_WORDS =
  "if then else elif fi for while until do done case esac in function select time return exit export local readonly " +
  "declare set unset source alias cd echo printf read eval exec trap sudo true false";
const SQL_WORDS =
  "select from where and or not null is in like between join left right inner outer full cross on using group by having " +
  "order asc desc limit offset union all distinct as insert into values update set delete create table view index " +
  "primary key foreign references unique default check alter add drop column constraint if exists case when then else " +
  "end begin commit rollback with recursive over partition count sum avg min max cast integer text varchar boolean true false";

const CODE = [comment("\\/\\/[^\\n]*", BLOCK), string(QUOTED, SINGLE, TEMPLATE), NUMBER, WORD];
const WITH_LIFETIMES = [comment("\\/\\/[^\\n]*", BLOCK), string(QUOTED, CHARACTER), NUMBER, WORD];
const PYTHON = [
  comment("#[^\\n]*"),
  string('"""[^]*?(?:"""|$)', "'''[^]*?(?:'''|$)", QUOTED, SINGLE), "(?<name>@[\\w.]+)", NUMBER, WORD,
];
const SHELL = [
  comment(HASH), string('"(?:[^"\\\\]|\\\\[^])*"?', "'[^']*'?"), "(?<name>\\$(?:\\w+|\\{[^}\\n]{0,200}\\}|[@#?*!$-]))",
  "(?<property>(?<![\\w-])--?[A-Za-z][\\w-]*)", NUMBER, "(?<word>[A-Za-z_][\\w-]*)",
];
const JSON_LIKE = [
  comment("\\/\\/[^\\n]*", BLOCK), '(?<property>"(?:[^"\\\\\\n]|\\\\[^])*"(?=\\s*:))', string(QUOTED), NUMBER, WORD,
];
const MARKUP = [
  comment("<!--[^]*?(?:-->|$)"), "(?<keyword><[\\/!?]?[A-Za-z][\\w:-]*|\\/?>)", "(?<property>(?<=\\s)[\\w:@.-]+(?==))",
  `(?<string>(?<==)(?:"[^"]*"?|'[^']*'?))`, "(?<number>&#?\\w+;)",
];
const STYLES = [
  comment(BLOCK), string(QUOTED, SINGLE), "(?<keyword>@[\\w-]+|!important)", "(?<property>(?<![\\w-])[\\w-]+(?=\\s*:\\s))",
  "(?<number>#[\\da-fA-F]{3,8}\\b|-?\\b\\d+(?:\\.\\d+)?(?:%|[a-z]+)?)",
];
const SETTINGS = [
  comment(HASH), "(?<keyword>^[ \\t]*\\[[^\\]\\n]*\\]+)", "(?<property>^[ \\t]*(?:- +)?[\\w./\"'-]+(?= *[:=]))",
  string(QUOTED, SINGLE), NUMBER, WORD,
];
const QUERY = [comment("--[^\\n]*", BLOCK), string("'(?:[^']|'')*'?", QUOTED), NUMBER, WORD];
const CHANGES = ["(?<keyword>^@@[^\\n]*|^(?:\\+\\+\\+|---|diff|index) [^\\n]*)", "(?<added>^\\+[^\\n]*)", "(?<gone>^-[^\\n]*)"];

const LANGUAGES = new Map();
for (const [names, patterns, known, flags] of [
  ["c h cpp c++ cc hpp cuda cu metal cs csharp java js javascript jsx mjs ts typescript tsx go golang kotlin kt php swift " +
    "scala dart zig glsl wgsl proto groovy", CODE, C_WORDS, "g"],
  ["rust rs ocaml haskell hs", WITH_LIFETIMES, RUST_WORDS, "g"],
  ["python py python3 pycon ruby rb elixir julia r nim", PYTHON, `${PYTHON_WORDS} end do module require nil true false`, "g"],
  ["sh bash shell zsh fish console makefile make dockerfile docker", SHELL, SHELL_WORDS, "g"],
  ["json jsonc json5 jsonl", JSON_LIKE, "true false null", "g"],
  ["html xml svg vue xhtml", MARKUP, "", "g"],
  ["css scss less", STYLES, "", "g"],
  ["yaml yml toml ini conf properties", SETTINGS, "true false null yes no on off", "gm"],
  ["sql sqlite postgresql mysql", QUERY, SQL_WORDS, "g"],
  ["diff patch", CHANGES, "", "gm"],
]) {
  const language = { pattern: new RegExp(patterns.join("|"), flags), words: words(known), isLoud: known === SQL_WORDS };
  for (const name of names.split(" ")) LANGUAGES.set(name, language);
}

/** `text` cut into [kind, piece]: comment, string, number, keyword, name, property, added, gone, or "" for plain. */
export function pieces(text, name) {
  const language = LANGUAGES.get(name.toLowerCase());
  if (!language || text.length > MOST_CHARACTERS) return [["", text]];
  const found = [];
  let plain = 0;
  for (const match of text.matchAll(language.pattern)) {
    const kind = kindOf(match, text, language);
    if (!kind) continue;
    if (match.index > plain) found.push(["", text.slice(plain, match.index)]);
    found.push([kind, match[0]]);
    plain = match.index + match[0].length;
  }
  if (plain < text.length) found.push(["", text.slice(plain)]);
  return found;
}

function kindOf(match, text, language) {
  const { word } = match.groups;
  if (word === undefined) return Object.keys(match.groups).find((name) => match.groups[name] !== undefined);
  if (language.words.has(language.isLoud ? word.toLowerCase() : word)) return "keyword";
  return text[match.index + word.length] === "(" ? "name" : "";
}
