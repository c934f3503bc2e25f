/** Runs a scenario on several servers in turn, and compares what was found. */
import type { Scenario, Target } from "./options.ts";
import type { Progress } from "./progress.ts";
import { type Result, Run } from "./run.ts";
import { Server } from "./target.ts";

/** Runs the scenario on each target in turn, `runs` times; gives the results by target. A command is started anew each time. */
export async function measure(targets: Target[], scenario: Scenario, runs: number, progress: Progress): Promise<Result[][]> {
  const results: Result[][] = targets.map(() => []);
  for (let round = 1; round <= runs; round++)
    for (const [i, target] of targets.entries()) {
      progress.prefix = `${runs > 1 ? `round ${round}/${runs}, ` : ""}${target.name}: `;
      (results[i] as Result[]).push(await measureOnce(target, scenario, progress));
    }
  return results;
}

/** One run on one target. @throws if it can't be made, with the target's name */
async function measureOnce(target: Target, scenario: Scenario, progress: Progress): Promise<Result> {
  let server: Server | undefined;
  try {
    server = await Server.start(target, scenario);
    return await new Run(scenario, server, progress).measure(target.name);
  } catch (error) {
    if (error instanceof Error) error.message = `${target.name}: ${error.message}`;
    throw error;
  } finally {
    await server?.stop();
  }
}

/** A figure of a run; lower is better. */
export type Figure = { name: string; of: (result: Result) => number | null };

export const CPU_A_DELIVERY: Figure = {
  name: "server CPU, µs a delivery",
  of: ({ serverCpuMicrosPerDelivery }) => serverCpuMicrosPerDelivery,
};
const P50: Figure = { name: "latency p50, ms", of: ({ latencyMs }) => latencyMs.p50 };
const P99: Figure = { name: "latency p99, ms", of: ({ latencyMs }) => latencyMs.p99 };
const WORST: Figure = { name: "worst latency, ms", of: ({ latencyMs }) => latencyMs.max };
const CPU_A_MEMBER: Figure = { name: "server CPU, µs a member", of: ({ connect }) => connect.cpuMicrosPerMember };
const BYTES_A_MEMBER: Figure = {
  name: "server memory, bytes a member",
  of: ({ serverBytes }) => serverBytes?.perMember ?? null,
};
const SECONDS_TO_REJOIN: Figure = { name: "seconds until all had joined", of: ({ flap }) => flap?.seconds ?? null };
const COLD: Figure = {
  name: "server CPU a delivery, the first second by the last",
  of: (result) => coldStart(result)?.ratio ?? null,
};

/** The figures by which runs are compared, the most important first. */
export function figuresOf({ mode, cpu }: Scenario, cold = false): [Figure, ...Figure[]] {
  if (mode === "connect") return [CPU_A_MEMBER];
  if (mode === "idle") return [BYTES_A_MEMBER];
  if (mode === "flap") return [SECONDS_TO_REJOIN];
  if (cold) return [COLD];
  return cpu === undefined ? [CPU_A_DELIVERY, P50, P99, WORST] : [P99, P50, WORST, CPU_A_DELIVERY];
}

/** µs of CPU a delivery in the first second of the traffic and in the last; undefined if they can't be read. */
export function coldStart({ series }: Result): { first: number; last: number; ratio: number } | undefined {
  const first = series[0]?.serverCpuMicrosPerDelivery ?? null;
  const last = series.at(-1)?.serverCpuMicrosPerDelivery ?? null;
  return first === null || last === null ? undefined : { first, last, ratio: first / last };
}

/** The middle value, or the mean of the two middle ones; null if there is none, or any is null. */
export function median(values: (number | null)[]): number | null {
  const sorted = values.filter((value) => value !== null).sort((a, b) => a - b);
  if (sorted.length === 0 || sorted.length < values.length) return null;
  const low = sorted[(sorted.length - 1) >> 1] as number;
  const high = sorted[sorted.length >> 1] as number;
  return (low + high) / 2;
}

/** One attempt of `carry`. `p99Ms` is the median of its runs; null if they couldn't be made. */
export type Step = { rooms: number; p99Ms: number | null; carried: boolean; runs: Result[] };

/**
 * The most rooms with which all is well and the p99 stays below a limit: twice as many until that fails, then halfway between
 * what was carried and what was not, until they differ by a tenth. A failure counts if it happens twice in a row: what else the
 * machine does can only make things worse.
 * @param first how many it begins with @param most how many it may try
 * @param measureAt runs with so many rooms, any number of times @param onStep is told of each attempt
 */
export async function carry(
  limitMs: number,
  [first, most]: [number, number],
  measureAt: (rooms: number) => Promise<Result[]>,
  onStep: (step: Step) => void = () => {},
): Promise<{ rooms: number; steps: Step[] }> {
  const steps: Step[] = [];
  const attempt = async (rooms: number): Promise<boolean> => {
    const runs = await measureAt(rooms).catch(() => []); // so overloaded that not even all could join
    const p99Ms = median(runs.map(P99.of));
    const carried = p99Ms !== null && p99Ms < limitMs && runs.every(({ ok }) => ok);
    const step = { rooms, p99Ms, carried, runs };
    steps.push(step);
    onStep(step);
    return carried;
  };
  const isCarried = async (rooms: number) => (await attempt(rooms)) || attempt(rooms);
  let carried = 0;
  let failed = Infinity;
  for (let rooms = first; failed === Infinity && rooms <= most; rooms *= 2)
    if (await isCarried(rooms)) carried = rooms;
    else failed = rooms;
  while (failed !== Infinity && failed - carried > Math.max(1, carried / 10)) {
    const between = Math.floor((carried + failed) / 2);
    if (await isCarried(between)) carried = between;
    else failed = between;
  }
  return { rooms: carried, steps };
}
