import DOMPurify from "dompurify";
import type { JSX } from "preact";
import { useMemo } from "preact/hooks";
import { marked } from "marked";

// No images, forms, styles or media: what a model writes must not load anything or look like a part of the page.
const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "b", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "kbd", "li",
    "ol", "p", "pre", "s", "span", "strong", "sub", "sup", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["href", "title", "align", "start"],
  ADD_URI_SAFE_ATTR: ["align", "start"], // DOMPurify compares values of unknown attributes with the expression below
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
};

function escaped(text: string): string {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
}

// HTML that a model writes is shown as text, and of an image its description.
marked.use({ breaks: true, renderer: { html: ({ text }) => escaped(text), image: ({ text }) => escaped(text) } });

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

/** Markdown of a stranger, for example a model, as HTML that can run and load nothing. */
export function safeHtml(text: string): string {
  return DOMPurify.sanitize(marked.parse(text, { async: false }), ALLOWED);
}

/** A block of Markdown that a model wrote. */
export function Markdown(props: { text: string }): JSX.Element {
  const html = useMemo(() => safeHtml(props.text), [props.text]);
  return <div class="markdown" dangerouslySetInnerHTML={{ __html: html }} />;
}
