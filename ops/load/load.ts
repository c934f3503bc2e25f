/**
 * The load tool: how much does this machine carry, at what latency, for how much CPU, and was anything lost?
 *
 *     bun run load                                                    a relay of its own, 100 rooms of 8, one sender at 60 Hz in each
 *     bun run load --url ws://localhost:3000 --rooms 10               a relay that runs already (--pid for its CPU and memory)
 *     bun run load --game 30/10                                       a host 30 times a second to all, the others 10 times to it
 *     bun run load --senders all --rooms 50 --phase random            a party: everybody sends, each at a moment of its own
 *     bun run load --rate 0 --vs "bun run ops/load/floor.ts"          saturated, compared with the floor, alternating
 *     bun run load --game 30/10 --rooms 4 --cpu 5/80 --series         on a machine that gives 5 ms of CPU in each 80 ms
 *     bun run load --game 30/10 --cpu 5/80 --carry 50                 how many rooms that machine carries with a p99 below 50 ms
 *     bun run load --connect --rooms 1250                             what connecting costs; --idle: what being connected costs
 *     bun run load --flap 1000 --rooms 125                            so many members reconnect at once
 *     bun run load --cold                                             what the first second costs
 *     bun run load --proxy nginx                                      what nginx costs: one relay directly, one behind it, and
 *                                                                     a cluster of two (--relays) behind it, alternating
 *
 * `--help` lists the flags. Exit code: 0 all well; 1 a delivery was lost, doubled, out of order or astray, or the server
 * closed a socket or refused something, or with --carry not even one room was carried; 2 the run could not be made.
 *
 * How it works: plain TCP sockets, one thread. Frames are built once, and a message costs filling in a header in place: sender,
 * sequence number, send time. A delivery is read from the bytes as they arrive, no JSON parsed. If there are two cores and
 * `taskset`, the server has core 0 and the tool core 1.
 *
 * Its parts: `options.ts` what is asked for; `wire.ts` frames and headers; `traffic.ts` who sends what to whom and when;
 * `members.ts` their connections; `sender.ts`; `ledger.ts` what arrived; `target.ts` and `cpu-group.ts` the server and its share
 * of a core; `run.ts` one run; `compare.ts` several; `report.ts`, `side-by-side.ts` and
 * `progress.ts` the output.
 */
import { readFlags } from "../shared/flags.ts";
import { carry, coldStart, figuresOf, measure, median } from "./compare.ts";
import { Flags, type Scenario, SHARED_FLAGS, SHARED_HELP, type Target } from "./options.ts";
import { milliseconds, Progress } from "./progress.ts";
import { comparison, describe, machine, notes, ratioOf, report, roomsText } from "./report.ts";
import type { Result } from "./run.ts";
import { sideBySide } from "./side-by-side.ts";
import { pinned, pinTool } from "./target.ts";
import { MAX_MEMBERS } from "./wire.ts";

const USAGE = "bun run load [flags]; --help lists them";
const HELP = `bun run load [flags]

${SHARED_HELP}
  --game HOST/OTHERS   in place of --senders, --rate and --targeted: the host sends so many messages a second to all, each
                       of the others so many \`to\` it; 30/10 is a usual game

behind a proxy
  --proxy nginx        one relay, one behind nginx and a cluster behind nginx, side by side: CPU a delivery and latency. Give a
                       --rate at which no core is full
  --relays N           relays of that cluster, 2 or 3 [2]

instead of traffic
  --connect            connect, create and join only
  --idle               the same, then stay connected for --seconds
  --flap N             the same, then N members reconnect at once with their clientIds

how the server fares
  --cpu RUN/PERIOD     it gets RUN ms of CPU in each PERIOD ms (5/80 is a shared-cpu-1x machine of Fly.io without burst); with
                       @10-20,25-30 after it only from second 10 to 20 and 25 to 30 of the measured time
  --rival all|10-20    another process is busy on the server's core, all the time or from second 10 to 20

output
  --series             also a line for each second of the run
  --cold               what a delivery costs in the first second of the traffic (no warm-up), against the last
  --carry MS           how many rooms it carries with a p99 below MS, all else as given; begins with --rooms [1]
  --json               one JSON object on stdout
  --help`;

type Options = {
  scenario: Scenario;
  targets: Target[];
  runs: number;
  series: boolean;
  cold: boolean;
  carryMs: number | undefined;
  json: boolean;
  /** Whether what nginx costs is asked. */
  proxy: boolean;
};

/** Reads the command line; ends the process if something is wrong with it. */
function readOptions(): Options {
  const flags = readFlags(USAGE, {
    ...SHARED_FLAGS,
    game: { type: "string" },
    connect: { type: "boolean" },
    idle: { type: "boolean" },
    flap: { type: "string" },
    cpu: { type: "string" },
    rival: { type: "string" },
    series: { type: "boolean" },
    cold: { type: "boolean" },
    carry: { type: "string" },
    proxy: { type: "string" },
    relays: { type: "string" },
  });
  const read = new Flags(USAGE);
  const { vs, game, connect, idle, flap, cpu, rival, series = false, cold = false, carry, json = false } = flags;
  const { proxy, relays } = flags;
  /** Ends the process if flags are given that have no meaning beside another. */
  const excludes = (flag: string, ...others: (keyof typeof flags)[]) => {
    const other = others.find((each) => flags[each] !== undefined);
    if (other !== undefined) read.fault(`--${flag} and --${other} exclude each other`);
  };
  const mode = connect ? "connect" : idle ? "idle" : flap !== undefined ? "flap" : "traffic";
  if (connect) excludes("connect", "idle", "flap");
  if (idle) excludes("idle", "flap");
  if (mode !== "traffic") excludes(mode, "game", "cold", "carry");
  if (game !== undefined) excludes("game", "senders", "rate", "targeted");
  if (cold) excludes("cold", "warmup", "url", "carry");
  if (carry !== undefined) excludes("carry", "series");
  if (cpu !== undefined) excludes("cpu", "url");
  if (rival !== undefined) excludes("rival", "url");

  if (proxy !== undefined) excludes("proxy", "url", "pid", "vs", "connect", "idle", "flap", "cpu", "rival", "cold", "carry");
  if (proxy !== undefined) read.oneOf("proxy", proxy, ["nginx"]);
  else if (relays !== undefined) read.fault("--relays belongs to --proxy");

  const scenario = read.scenario(flags, mode, { ...(cold && { warmup: "0" }), ...(carry !== undefined && { rooms: "1" }) });
  scenario.flap = flap === undefined ? 0 : read.count("flap", flap, 0);
  if (scenario.flap > scenario.rooms * scenario.clients) read.fault("--flap must be at most --rooms times --clients");
  if (game !== undefined) {
    const [host, others] = read.pair("game", game, 0.01);
    scenario.game = { host, others };
  }
  if (cpu !== undefined) scenario.cpu = read.cpu(cpu);
  if (rival !== undefined) scenario.rival = rival === "all" ? [{ from: 0, to: scenario.seconds }] : read.spans("rival", rival);
  const targets =
    proxy === undefined ? read.targets(flags) : read.behindNginx(flags, Number(read.oneOf("relays", relays ?? "2", ["2", "3"])));
  if (targets.some(({ url }) => url !== undefined) && (cpu !== undefined || rival !== undefined || cold))
    read.fault("--cpu, --rival and --cold need servers that this tool starts");
  if (rival !== undefined && !pinned(targets)) read.fault("--rival needs two cores and taskset");
  const carryMs = carry === undefined ? undefined : read.amount("carry", carry, 0);
  const runs = read.runs(flags, (vs !== undefined && carry === undefined) || proxy !== undefined ? 3 : 1);
  return { scenario, targets, runs, series, cold, carryMs, json, proxy: proxy !== undefined };
}

/** Runs the scenario on one target or two and prints what was found; gives whether all runs were well. */
async function runAndPrint({ targets, scenario, runs, series, cold, json, proxy }: Options): Promise<boolean> {
  const results = await measure(targets, scenario, runs, new Progress());
  const all = results.flat();
  if (json) {
    const [{ name, of }] = figuresOf(scenario, cold);
    const medians = results.map((each) => median(each.map(of)));
    const full = (result: Result) => ({
      ...result,
      ...(cold && { cold: coldStart(result) }),
      notes: notes(result, scenario),
    });
    const found =
      all.length === 1
        ? { result: full(all[0] as Result) }
        : { headline: name, medians, ratio: ratioOf(medians), results: results.map((each) => each.map(full)) };
    console.log(JSON.stringify({ machine: machine(targets), scenario, ...found }, null, 2));
  } else {
    console.log(`${machine(targets)}\n${describe(scenario)}`);
    for (const run of all) console.log(`\n${run.target}\n${report(run, scenario, { series, cold })}`);
    if (proxy) console.log(`\n${sideBySide(targets, results)}`);
    else if (all.length > 1) console.log(`\n${comparison(targets, results, scenario, cold)}`);
  }
  return all.every(({ ok }) => ok);
}

/** Finds how many rooms each target carries, and prints it; gives whether each carries any. */
async function carryAndPrint({ targets, scenario, runs, json }: Options, limitMs: number): Promise<boolean> {
  const progress = new Progress();
  const most = Math.floor(MAX_MEMBERS / scenario.clients);
  const say = (text: string) => json || console.log(text);
  const found = [];
  say(`${machine(targets)}\nFrom ${describe(scenario)}`);
  for (const target of targets) {
    say(`\n${target.name}`);
    const measureAt = async (rooms: number) => (await measure([target], { ...scenario, rooms }, runs, progress)).flat();
    const carried = await carry(limitMs, [scenario.rooms, most], measureAt, ({ rooms, p99Ms, carried, runs }) => {
      const p99 = p99Ms === null ? "not all could join" : `p99 ${milliseconds(p99Ms)} ms`;
      say(`  ${roomsText(rooms)}: ${p99}${carried ? "" : ", too much"}`);
      for (const note of runs.flatMap((run) => notes(run, scenario))) say(`    Note: ${note}.`);
    });
    found.push({ target: target.name, ...carried });
    say(`  carries ${roomsText(carried.rooms)} with a p99 below ${limitMs} ms`);
  }
  if (json) console.log(JSON.stringify({ machine: machine(targets), scenario, limitMs, carried: found }, null, 2));
  return found.every(({ rooms }) => rooms > 0);
}

async function main(): Promise<number> {
  if (Bun.argv.includes("--help")) {
    console.log(HELP);
    return 0;
  }
  const options = readOptions();
  pinTool(options.targets);
  const { carryMs } = options;
  return (await (carryMs === undefined ? runAndPrint(options) : carryAndPrint(options, carryMs))) ? 0 : 1;
}

for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => process.exit(2));
try {
  process.exitCode = await main();
} catch (error) {
  console.error(`load: ${(error as Error).message}`);
  process.exitCode = 2;
}
