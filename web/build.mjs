// Build the pages: node build.mjs [DIRECTORY]
//
// Every folder with a main.tsx is a page. Page "chat" becomes chat.html, chat.js and chat.css in DIRECTORY, by default
// minimind_mcore/web. learn/ is no page: its script and style go to docs/figures, for the chapters of the documentation.
// The same sources and packages give the same bytes.
import { build } from "esbuild";
import { existsSync, readFileSync, readdirSync, renameSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const out = process.argv[2] ?? join(here, "../minimind_mcore/web");
const pages = readdirSync(here).filter((name) => existsSync(join(here, name, "main.tsx"))).sort();

const result = await build({
  absWorkingDir: here,
  entryPoints: pages.map((name) => ({ in: `${name}/main.tsx`, out: name })),
  outdir: out,
  bundle: true,
  minify: true,
  metafile: true,
  format: "iife",
  target: "es2022",
  charset: "utf8",
  legalComments: "none", // licenses.txt has the whole licenses
  logLevel: "warning",
  jsx: "automatic",
  jsxImportSource: "preact",
});

for (const name of pages.filter((page) => page !== "learn")) {
  const html = readFileSync(join(here, "shared/page.html"), "utf8");
  writeFileSync(join(out, `${name}.html`), html.replaceAll("PAGE", name));
}

if (!process.argv[2]) {
  for (const kind of ["js", "css"]) renameSync(join(out, `learn.${kind}`), join(here, `../docs/figures/learn.${kind}`));
}

const inputs = Object.keys(result.metafile.inputs);
const packages = new Set(inputs.filter((path) => path.startsWith("node_modules/")).map((path) => path.split("/")[1]));
const licenses = [...packages].sort().map((name) => {
  const { version } = JSON.parse(readFileSync(join(here, "node_modules", name, "package.json"), "utf8"));
  const file = readdirSync(join(here, "node_modules", name)).find((entry) => /^licen[cs]e/i.test(entry));
  return `${name} ${version}\n\n${readFileSync(join(here, "node_modules", name, file), "utf8").trim()}\n`;
});
writeFileSync(join(out, "licenses.txt"), licenses.join(`\n${"-".repeat(80)}\n\n`));
