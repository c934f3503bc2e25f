/**
 * How the cost of a delivery grows: the same traffic with more members a room, more rooms, larger messages, or more silent
 * sockets beside it; a run for each of some rising values, and a plot of them.
 *
 *     bun run growth clients --plot clients.svg
 *     bun run growth bytes --seconds 2 --vs "bun run ops/load/floor.ts"
 *
 * `--help` lists the flags. Exit codes are those of `bun run load`, which measures one such point.
 */
import { parseArgs } from "node:util";
import { badUsage } from "../shared/flags.ts";
import { CPU_A_DELIVERY, measure, median } from "./compare.ts";
import { Flags, type Scenario, SHARED_FLAGS, SHARED_HELP } from "./options.ts";
import { plotSvg } from "./plot.ts";
import { figure, percent, Progress, thousands } from "./progress.ts";
import { machine, notes, report } from "./report.ts";
import type { Result } from "./run.ts";
import { pinTool } from "./target.ts";
import { leastBytes } from "./wire.ts";

const USAGE = "bun run growth rooms|clients|bytes|sockets [flags]; --help lists them";
const HELP = `bun run growth WHAT [flags]

WHAT rises, and what stays the same
  clients              members a room; members and deliveries a second in all
  rooms                rooms (of 4 unless --clients says otherwise); messages a second in all
  bytes                size of \`data\`; saturated unless --rate says otherwise
  sockets              idle ones beside the traffic; the traffic

${SHARED_HELP}

output
  --plot FILE.svg      draw it
  --json               one JSON object on stdout
  --help`;

/** What rises, by its name in a plot. */
const LABELS = { rooms: "rooms", clients: "members a room", bytes: "payload, bytes", sockets: "sockets" };

type Growth = keyof typeof LABELS;

/** 3,000 rooms of 8 would be more sockets than a process may usually open. */
const DEFAULTS = { rooms: { clients: "4" }, clients: {}, bytes: { rate: "0" }, sockets: {} };

/** One value of a series: what was run, and what each target's runs found. */
type Point = { value: number; scenario: Scenario; results: Result[][] };

/** The scenarios of a series, with the value that rises. What else would change the cost is kept as it is. */
function seriesOf(growth: Growth, base: Scenario): [number, Scenario][] {
  const { rooms, clients, rate, senders } = base;
  switch (growth) {
    case "rooms":
      return [10, 30, 100, 300, 1000, 3000].map((value) => [value, { ...base, rooms: value, rate: (rate * rooms) / value }]);
    case "clients":
      return [2, 4, 8, 16, 32, 64, 125, 250, 500].map((value) => {
        const count = Math.max(1, Math.round((rooms * clients) / value));
        const wanted = rate * rooms * (senders === "all" ? clients : senders) * (clients - 1);
        const sending = senders === "all" ? value : Math.min(senders, value);
        return [
          value,
          {
            ...base,
            clients: value,
            rooms: count,
            senders: senders === "all" ? senders : sending,
            rate: wanted / (count * sending * (value - 1)),
          },
        ];
      });
    case "bytes":
      return [16, 64, 256, 1024, 4096, 16384, 65536]
        .filter((value) => value >= leastBytes(base.payload))
        .map((value) => [value, { ...base, bytes: value }]);
    case "sockets": {
      // The traffic is in as many rooms as fit into the smallest value.
      const values = [100, 300, 1000, 3000, 10_000, 15_000];
      const busy = Math.max(1, Math.floor((values[0] as number) / clients));
      return values.map((value) => [
        value,
        { ...base, rooms: busy, idleRooms: Math.max(0, Math.round(value / clients) - busy), rate: (rate * rooms) / busy },
      ]);
    }
  }
}

/** One line for each target. */
function pointText(growth: Growth, { value, scenario, results }: Point): string {
  return results
    .map((runs) => {
      const middle = (pick: (result: Result) => number | null) => figure(median(runs.map(pick)));
      const lines = [
        `${LABELS[growth]} ${thousands(value)}, ${runs[0]?.target}: ${middle(CPU_A_DELIVERY.of)} µs a delivery, ` +
          `${middle((run) => run.deliveriesPerSecond)} deliveries a second, ` +
          `p50 ${middle((run) => run.latencyMs.p50)} ms, p99 ${middle((run) => run.latencyMs.p99)} ms, ` +
          `${percent(median(runs.map((run) => run.serverCpuCore)))} of a core`,
      ];
      for (const run of runs) {
        if (!run.ok) lines.push(report(run, scenario));
        else for (const note of notes(run, scenario)) lines.push(`  Note: ${note}.`);
      }
      return lines.join("\n");
    })
    .join("\n");
}

async function main(): Promise<number> {
  if (Bun.argv.includes("--help")) {
    console.log(HELP);
    return 0;
  }
  const { values: flags, positionals } = parse();
  const read = new Flags(USAGE);
  const [what = "", ...more] = positionals;
  if (more.length > 0 || !(what in LABELS)) read.fault(`the first word is one of ${Object.keys(LABELS).join(", ")}`);
  const growth = what as Growth;
  if (growth === "bytes" && flags.bytes !== undefined) read.fault("bytes and --bytes exclude each other");
  const scenario = read.scenario(flags, "traffic", DEFAULTS[growth]);
  const [targets, runs] = [read.targets(flags), read.runs(flags, flags.vs === undefined ? 1 : 3)];
  pinTool(targets);

  const points: Point[] = [];
  const progress = new Progress();
  for (const [value, each] of seriesOf(growth, scenario)) {
    const point = { value, scenario: each, results: await measure(targets, each, runs, progress) };
    points.push(point);
    if (!flags.json) console.log(pointText(growth, point));
  }
  if (flags.json) console.log(JSON.stringify({ machine: machine(targets), growth, points }, null, 2));
  if (flags.plot !== undefined) {
    const curves = targets.map(({ name }, i) => ({
      name,
      points: points.flatMap(({ value, results }): [number, number][] => {
        const cost = median((results[i] as Result[]).map(CPU_A_DELIVERY.of));
        return cost === null ? [] : [[value, cost]];
      }),
    }));
    if (curves.every(({ points }) => points.length === 0)) throw new Error("nothing to plot: the server's CPU can't be read");
    const title = `Cost a delivery by ${LABELS[growth]}`;
    await Bun.write(flags.plot, plotSvg(title, machine(targets), LABELS[growth], CPU_A_DELIVERY.name, curves));
  }
  return points.every(({ results }) => results.flat().every(({ ok }) => ok)) ? 0 : 1;
}

function parse() {
  try {
    return parseArgs({ options: { ...SHARED_FLAGS, plot: { type: "string" } }, allowPositionals: true });
  } catch (error) {
    return badUsage(USAGE, (error as Error).message);
  }
}

for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => process.exit(2));
try {
  process.exitCode = await main();
} catch (error) {
  console.error(`growth: ${(error as Error).message}`);
  process.exitCode = 2;
}
