/** What a proxy costs, as a table: a line for each of the set-ups that were measured, the one without a proxy first. */
import { median } from "./compare.ts";
import type { Target } from "./options.ts";
import { figure, milliseconds, percent } from "./progress.ts";
import type { Result } from "./run.ts";
import { coresOf, pinned, TOOL_CORE } from "./target.ts";

const HEADS = [
  "relays, µs",
  "nginx, µs",
  "together",
  "p50 ms",
  "p99 ms",
  "added p50",
  "added p99",
  "relays' CPU",
  "nginx's",
  "lost",
];
const FULL_CORE = 0.7; // beyond it messages wait for each other, and latencies say how full the core is

/** The medians of each target's runs, and what they are more than the first one's. */
export function sideBySide(targets: Target[], results: Result[][]): string {
  const width = Math.max(...targets.map(({ name }) => name.length));
  const line = (name: string, cells: string[]) =>
    `${name.padEnd(width)}  ${cells.map((cell, i) => cell.padStart(HEADS[i]?.length ?? 0)).join("  ")}`;
  const notes: string[] = [];
  const rows = targets.map(({ name, behindNginx = 0 }, i) => {
    const runs = results[i] as Result[];
    const middle = (of: (result: Result) => number | null, each = runs) => median(each.map(of));
    const ofNginx = (result: Result) => (behindNginx === 0 ? 0 : result.proxyCpuMicros);
    const relays = middle(({ serverCpuMicrosPerDelivery }) => serverCpuMicrosPerDelivery);
    const nginx = middle((result) => aDelivery(ofNginx(result), result));
    const p50 = ({ latencyMs }: Result) => latencyMs.p50;
    const p99 = ({ latencyMs }: Result) => latencyMs.p99;
    const added = (of: typeof p50) => (middle(of) ?? 0) - (middle(of, results[0]) ?? 0);
    const ms = (value: number | null) => (value === null ? "n/a" : milliseconds(value));
    const relaysCore = middle(({ serverCpuCore }) => serverCpuCore);
    const nginxCore = middle((result) => core(ofNginx(result), result));
    const busiest = (relaysCore ?? 0) / Math.max(1, behindNginx) + (sharesCore(behindNginx) ? (nginxCore ?? 0) : 0);
    if (busiest > FULL_CORE)
      notes.push(`${name}: a core was ${percent(busiest)} busy; latencies say little, give a lower --rate`);
    return line(name, [
      ...[figure(relays), figure(nginx), figure(relays === null || nginx === null ? null : relays + nginx)],
      ...[ms(middle(p50)), ms(middle(p99)), ms(added(p50)), ms(added(p99))],
      ...[percent(relaysCore), percent(nginxCore), String(runs.reduce((sum, { lost }) => sum + lost, 0))],
    ]);
  });
  return [
    line("µs of CPU a delivery", HEADS),
    ...rows,
    "",
    "  nginx has one worker process; what it costs is the CPU of that one, while messages flow.",
    ...(pinned(targets) ? targets.map(placeOf).filter(Boolean) : []),
    ...notes.map((note) => `  Note: ${note}.`),
  ].join("\n");
}

const aDelivery = (micros: number | null, { deliveries }: Result) => (micros === null ? null : micros / deliveries);
const core = (micros: number | null, { seconds }: Result) => (micros === null ? null : micros / 1e6 / seconds);
const sharesCore = (relays: number) => coresOf(relays).relays.includes(coresOf(relays).nginx);

/** Which core does what, and who shares one. */
function placeOf({ name, behindNginx }: Target): string {
  if (behindNginx === undefined) return "";
  const { relays, nginx } = coresOf(behindNginx);
  const shared = relays.includes(TOOL_CORE) ? ", the load tool's core among them: that adds to its latencies" : "";
  return `  ${name}: relays on core ${relays.join(" and ")}, nginx on core ${nginx}${shared}.`;
}
