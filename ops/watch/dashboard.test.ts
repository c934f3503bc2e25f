/** The form of the Grafana dashboard. `dashboard.real.ts` puts its queries to a Prometheus. */
import { expect, test } from "bun:test";
import { scrape } from "../shared/metrics.ts";
import { testRelay } from "../shared/relay.ts";
import type { Dashboard, Panel } from "./dashboard.ts";
import { faults, readDashboard } from "./dashboard.ts";

const dashboard = await readDashboard();

/** The dashboard with one thing changed. */
function changed(change: (dashboard: Dashboard, panel: Panel) => void): Dashboard {
  const copy = structuredClone(dashboard);
  change(copy, copy.panels.find(({ title }) => title === "Memory") as Panel);
  return copy;
}

test("the dashboard has the form that Grafana's import needs", () => {
  expect(faults(dashboard)).toEqual([]);
});

test.each<[string, (dashboard: Dashboard, panel: Panel) => void]>([
  ["uid a b: 1 to 40 letters, digits, - or _", (all) => (all.uid = "a b")],
  ["id: null, or the import overwrites what has that id", (all) => (all.id = 7)],
  ["schemaVersion: at least 36", (all) => (all.schemaVersion = 16)],
  ["templating: a data source variable is needed", (all) => all.templating.list.shift()],
  ["panels Event loop lag and Memory overlap", (_, panel) => (panel.gridPos.x = 0)],
  ["panel Memory: outside the grid of 24 columns", (_, panel) => (panel.gridPos.x = 20)],
  ["panel Memory: no sentence of help", (_, panel) => (panel.description = "")],
  ["panel Memory: unit none isn't a known one", (_, panel) => delete panel.fieldConfig?.defaults.unit],
  [
    "panel Memory: thresholds must rise",
    (_, panel) => panel.fieldConfig?.defaults.thresholds?.steps.push({ color: "red", value: 1 }),
  ],
  ["panel Memory: no variable $job", (_, panel) => panel.targets?.push({ refId: "Z", expr: "up{job=~'$job'}" })],
  [
    'panel Memory: party_sockets_rooms lacks region=~"$region"',
    (_, panel) => panel.targets?.push({ refId: "Z", expr: "party_sockets_rooms" }),
  ],
  ["panel Memory: refId repeats", (_, panel) => panel.targets?.forEach((target) => (target.refId = "A"))],
  [
    "panel Memory: the data source must be the variable",
    (_, panel) => panel.targets?.forEach((target) => (target.datasource = { uid: "mine" })),
  ],
])("the check finds: %s", (fault, change) => {
  expect(faults(changed(change))).toContain(fault);
});

test("each series of the relay is on the dashboard", async () => {
  await using relay = testRelay();
  const metrics = await scrape(relay.url);
  const names = [...metrics.matchAll(/^# TYPE (\S+)/gm)].map(([, name]) => name as string);
  const exprs = dashboard.panels.flatMap(({ targets }) => targets?.map(({ expr }) => expr) ?? []);
  expect(names.filter((name) => !exprs.some((expr) => expr.includes(`${name}{`)))).toEqual([]);
});

test("the red line for memory is the alert's, and 80 % of the machine in fly.toml", async () => {
  const read = (name: string) => Bun.file(new URL(name, import.meta.url)).text();
  const { vm } = Bun.TOML.parse(await read("../../fly.toml")) as { vm: { memory: string }[] };
  const [, mebibytes] = /^(\d+)mb$/.exec(vm[0]?.memory ?? "") ?? [];
  const [, inAlert] = /process_resident_memory_bytes > 0\.8 \* (\d+) \* 1024 \* 1024 /.exec(await read("../alerts.yml")) ?? [];
  const steps = dashboard.panels.find(({ title }) => title === "Memory")?.fieldConfig?.defaults.thresholds?.steps;
  expect(inAlert).toBe(mebibytes as string);
  expect(steps?.at(-1)).toEqual({ color: "red", value: 0.8 * Number(mebibytes) * 1024 * 1024 });
});
