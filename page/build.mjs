// Builds the page: node build.mjs FOLDER. The same sources and package-lock.json give the same bytes.

import { copyFile, readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import { build } from "esbuild";

const BUNDLED = ["preact"];

const from = (...parts) => path.join(import.meta.dirname, ...parts);
const folder = path.resolve(process.argv[2] ?? from("../synapse_sticky/admin/page"));

const { metafile } = await build({
  absWorkingDir: import.meta.dirname,
  entryPoints: [from("src/main.jsx"), from("src/page.css")],
  entryNames: "page",
  outdir: folder,
  bundle: true,
  minify: true,
  metafile: true,
  jsx: "automatic",
  jsxImportSource: "preact",
  target: ["chrome111", "firefox115", "safari16.4"],
  logLevel: "warning",
});
for (const name of ["index.html", "icon.svg"]) await copyFile(from("src", name), path.join(folder, name));

const packages = Object.keys(metafile.inputs).map((input) => input.match(/^node_modules\/((@[^/]+\/)?[^/]+)/)?.[1]);
const unknown = packages.filter((name) => name && !BUNDLED.includes(name));
if (unknown.length) throw new Error(`page.js has a package whose licence is not shipped: ${unknown}`);
const licences = BUNDLED.map(async (name) => {
  const { version, license } = JSON.parse(await readFile(from("node_modules", name, "package.json"), "utf8"));
  const text = await readFile(from("node_modules", name, "LICENSE"), "utf8");
  return `${name} ${version} (${license}), which is part of page.js:\n\n${text.trim()}\n`;
});
await writeFile(path.join(folder, "LICENSES.txt"), (await Promise.all(licences)).join("\n"));
