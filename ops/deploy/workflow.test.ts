/** The workflow of GitHub Actions, read. `workflow.real.ts` gives it to a linter. */
import { expect, test } from "bun:test";
import { join } from "node:path";
import { ROOT } from "../shared/processes.ts";

type Step = { uses?: string; run?: string };
type Workflow = { on: object; permissions: object; concurrency: object; jobs: Record<string, { steps: Step[] }> };
const workflow = Bun.YAML.parse(await Bun.file(join(ROOT, ".github/workflows/ci.yml")).text()) as Workflow;

test("a push to a pull request's branch starts one run, and ends the one before", () => {
  expect(workflow.on).toEqual({ push: { branches: ["main"] }, pull_request: null });
  expect(workflow.concurrency).toEqual({
    group: "ci-${{ github.ref }}",
    "cancel-in-progress": "${{ github.event_name == 'pull_request' }}",
  });
});

test("a run may read the repository and nothing else, and takes no action by a name that can move", () => {
  expect(workflow.permissions).toEqual({ contents: "read" });
  const actions = Object.values(workflow.jobs).flatMap(({ steps }) => steps.flatMap(({ uses }) => uses ?? []));
  for (const action of actions) expect(action).toMatch(/^[\w.-]+\/[\w.-]+@[0-9a-f]{40}$/);
});
