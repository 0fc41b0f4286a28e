// Mathematics: arithmatex leaves \(...\) and \[...\] in elements of its class; KaTeX draws them.
for (const element of document.querySelectorAll(".arithmatex")) {
  const text = element.textContent.trim();
  katex.render(text.slice(2, -2), element, { displayMode: text.startsWith("\\["), throwOnError: false });
}

// Diagrams: three megabytes, for pages that have one only. The theme draws them when mermaid is there.
if (document.querySelector(".mermaid")) {
  const here = new URL(".", document.currentScript.src);
  document.write(`<script src="${new URL("vendor/mermaid/mermaid.min.js", here)}"></script>`);
}
