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
const parts = await Promise.all(
  BUNDLED.map(async (name) => {
    const { version, license } = JSON.parse(await readFile(from("node_modules", name, "package.json"), "utf8"));
    const text = await readFile(from("node_modules", name, "LICENSE"), "utf8");
    return { name, version, license, text: text.trim() };
  }),
);
const licences = parts.map(
  ({ name, version, license, text }) => `${name} ${version} (${license}), which is part of page.js:\n\n${text}\n`,
);
await writeFile(path.join(folder, "LICENSES.txt"), licences.join("\n"));

// What page.js was bundled from, for the SBOMs of the wheel: CycloneDX, without a time and a number of its own.
const locked = JSON.parse(await readFile(from("package-lock.json"), "utf8")).packages;
const component = ({ name, version, license }) => {
  const [, sha512] = locked[`node_modules/${name}`].integrity.match(/^sha512-(\S+)$/);
  const purl = `pkg:npm/${name.replace("@", "%40")}@${version}`;
  return {
    type: "library",
    "bom-ref": purl,
    name,
    version,
    scope: "required",
    hashes: [{ alg: "SHA-512", content: Buffer.from(sha512, "base64").toString("hex") }],
    licenses: [{ expression: license }],
    purl,
  };
};
const own = [{ expression: "Apache-2.0" }];
const page = { type: "application", "bom-ref": "page.js", name: locked[""].name, licenses: own };
const components = parts.map(component);
const bom = {
  bomFormat: "CycloneDX",
  specVersion: "1.5",
  version: 1,
  metadata: { component: page },
  components,
  dependencies: [
    { ref: page["bom-ref"], dependsOn: components.map((part) => part["bom-ref"]) },
    ...components.map((part) => ({ ref: part["bom-ref"] })),
  ],
};
await writeFile(path.join(folder, "page.cyclonedx.json"), `${JSON.stringify(bom, null, 2)}\n`);
