/**
 * Everything at once against one relay: the siege's attacks one after another, fuzz, soak parties and ordinary ones through a
 * real nginx, and a real Prometheus with the alert rules; three restarts with a drain amid hostile requests, and one kill.
 *
 *     bun run ops/trials/everything.ts --minutes 30 --seed 7
 *
 *     --minutes N   how long the phases are together [30]
 *     --restarts N  restarts with a drain; one kill comes on top [3]
 *     --parties N   ordinary parties of four, whose members reconnect as clients do [10]
 *     --drain N     DRAIN_SECONDS of the relay [8]
 *     --server PATH another server.ts, to see what this finds
 *     --seed N      the order of the attacks, and the choices of fuzz and soak
 *
 * The relay has core 0, all else core 1. Attackers and fuzz reach it directly, as if they were other addresses behind the same
 * proxy. It needs Debian's nginx and prometheus, and no root. At the end it prints what each life of the relay was like, what
 * the sieges' neighbour felt, which alerts fired and had a reason to, and the faults. Milliseconds are no fault: all who attack
 * and all who measure share a core. Exit code: 0; 1 with faults; 2 if it couldn't be tried.
 *
 * Its parts: `everything/parties.ts` the ordinary parties, `everything/watch.ts` what is seen of the relay and of the alerts,
 * `everything/report.ts` the output.
 */
import { availableParallelism } from "node:os";
import { resolve } from "node:path";
import { Client } from "../shared/client.ts";
import { badUsage, readFlags } from "../shared/flags.ts";
import { vitals } from "../shared/metrics.ts";
import { Child, freePort, ROOT } from "../shared/processes.ts";
import { whyNoPrometheus } from "../shared/prometheus.ts";
import { nginx } from "../shared/proxies.ts";
import { Random } from "../shared/random.ts";
import { PATIENCE_MS, type TooLate, until, within } from "../shared/wait.ts";
import type { Report } from "./everything/parties.ts";
import { judge, mebi, ms, report } from "./everything/report.ts";
import { Alerts, Watch } from "./everything/watch.ts";
import { Part } from "./part.ts";
import { ATTACKS } from "./siege/attacks.ts";
import type { Row } from "./siege.ts";

const PROGRESS_MS = 15_000;
const BEGIN_MS = 30_000;
const EXTRA_MS = 90_000; // what a trial may need beyond its seconds: its setting up, and what is late
const FULL_MS = 30_000; // in which memory has to have fallen
const EMPTY_MS = 30_000; // a paused flooder's queue empties at the refill rate, a lingering room takes its time
const WHOLE_MS = 90_000;
const WARM_UP = 1.25; // a trial's warm-up is a fourth of its time, and comes on top
const MEMORY_BYTES = 256 * 1024 * 1024; // what a machine of 512 MB is given by default
const EASY_BYTES = 0.9 * MEMORY_BYTES; // just below the bound the next newcomer may be refused again
const EXIT_OF_KILL = 128 + 9;

const USAGE =
  "bun run ops/trials/everything.ts [--minutes 30] [--restarts 3] [--parties 10] [--drain 8] [--server PATH] [--seed N]";
const string = { type: "string" } as const;
const values = readFlags(USAGE, {
  minutes: string,
  restarts: string,
  parties: string,
  seed: string,
  drain: string,
  server: string,
});
const minutes = Number(values.minutes ?? 30);
const restarts = Number(values.restarts ?? 3);
const parties = Number(values.parties ?? 10);
const drainSeconds = Number(values.drain ?? 8);
const server = resolve(values.server ?? `${ROOT}/server.ts`);
const seed = Number(values.seed ?? crypto.getRandomValues(new Uint16Array(1))[0]);
if (!(minutes > 0 && minutes <= 600)) badUsage(USAGE, "--minutes must be a number up to 600");
for (const [name, value] of Object.entries({ restarts, parties, drain: drainSeconds, seed }))
  if (!Number.isSafeInteger(value) || value < 0) badUsage(USAGE, `--${name} must be a whole number`);
const missing = nginx.whyNot || whyNoPrometheus || "";
if (missing !== "") badUsage(USAGE, `it can't be tried: ${missing}`);

const pins = availableParallelism() > 1 && Bun.which("taskset") !== null;
if (pins) Bun.spawnSync(["taskset", "-acp", "1", String(process.pid)]); // whatever it starts is there, too
const onRelayCore = pins ? ["taskset", "-c", "0"] : [];

const begun = performance.now();
const random = new Random(seed);
const faults: string[] = [];
const rows: Row[] = [];
const endings: string[] = [];
const now = () => ((performance.now() - begun) / 1000).toFixed(0);
const say = (text: string) => console.log(`${now().padStart(5)} s  ${text}`);
const fault = (text: string) => {
  faults.push(`${now()} s: ${text}`);
  say(`FAULT ${text}`);
};
const script = (path: string, ...args: string[]) => [process.execPath, "run", `${import.meta.dir}/${path}`, ...args];

/** The relay's port, which it has in each of its lives. */
const port = freePort();
const relayUrl = `http://127.0.0.1:${port}`;
await using stack = new AsyncDisposableStack();
let relay: Child | undefined;
const watch = stack.use(new Watch(relayUrl));

async function startRelay(): Promise<void> {
  const env = {
    ...{ PORT: `${port}`, HOST: "127.0.0.1", ADDRESS_HEADER: "X-Forwarded-For", DRAIN_SECONDS: `${drainSeconds}` },
    ...{ MAX_MEMORY_BYTES: `${MEMORY_BYTES}`, IDLE_EXIT_SECONDS: "60" }, // it outlives this process by so long if that is killed
  };
  const child = new Child([...onRelayCore, process.execPath, "run", server], { env });
  stack.use(child);
  relay = child;
  watch.begin(`life ${watch.lives.length + 1}`);
  await child.saysPort();
}

/** Ends the relay and checks how it ended. @param how what the report calls it */
async function endRelay(how: string, signal: "SIGTERM" | "SIGKILL", patienceMs: number): Promise<void> {
  await watch.look();
  const child = relay as Child;
  if (child.exitCode !== null)
    fault(`the relay had ended by itself with ${child.exitCode}: ${child.lines.slice(-3).join(" | ")}`);
  const began = performance.now();
  const code = await child.stop(signal, patienceMs);
  const took = ((performance.now() - began) / 1000).toFixed(1);
  endings.push(`${how} at ${now()} s: exit ${code} after ${took} s`);
  say(endings.at(-1) as string);
  if (code !== (signal === "SIGKILL" ? EXIT_OF_KILL : 0)) fault(`${how}: exit ${code}; ${child.lines.slice(-3).join(" | ")}`);
  const exceptions = child.lines.filter((line) => line.includes(" exception "));
  for (const line of exceptions.slice(0, 3)) fault(`one of ${exceptions.length} exceptions in the relay's log: ${line}`);
}

/** Waits until the relay takes newcomers again: whoever comes while memory falls is told to come later. */
async function welcomes(): Promise<void> {
  const since = performance.now();
  const isWelcome = async () => {
    const client = await Client.open(relayUrl, { "X-Forwarded-For": "198.51.100.1" }).catch(() => undefined);
    if (client === undefined) return false;
    const answer = await within(client.ask({ type: "ping" }), "a pong").catch(() => undefined);
    client.terminate();
    return answer?.type === "pong" && (await vitals(relayUrl)).rssBytes < EASY_BYTES;
  };
  await until("newcomers to be welcome", isWelcome, FULL_MS).catch((error: Error) => fault(error.message));
  const took = performance.now() - since;
  if (took > 1_000) say(`newcomers were welcome again after ${ms(took)} ms`);
}

/** A trial that goes on beside the others. */
async function startTrial(name: "fuzz" | "soak", url: string, seconds: number): Promise<Child> {
  const flags = ["--url", url, "--shared", "--seed", String(seed + watch.lives.length), "--seconds", seconds.toFixed(1)];
  const child = stack.use(new Child(script(`${name}.ts`, ...flags)));
  await child.line(/ begins$/, BEGIN_MS);
  return child;
}

/** Waits for a trial's end, which must be a good one. */
async function judgeTrial(name: string, child: Child, seconds: number): Promise<string> {
  const code = await within(child.exited, `the end of ${name}`, seconds * 1000 + EXTRA_MS).catch(
    (error: TooLate) => error.message,
  );
  await child[Symbol.asyncDispose]();
  const found = child.lines.filter((line) => line.startsWith("FAULT ")).slice(0, 5);
  if (code !== 0)
    fault(`${name} in life ${watch.lives.length}: ${code}: ${found.join(" | ") || child.lines.slice(-2).join(" | ")}`);
  return `${name} ${code === 0 ? "passed" : "failed"}: ${child.lines.findLast((line) => line.includes("bystanders=")) ?? ""}`;
}

const attacks = Object.keys(ATTACKS).filter((name) => ATTACKS[name]?.siblings === undefined);
let queue: string[] = [];
let attackNow = "";

/** The next attack, on the relay as everybody else has it. @param most seconds */
async function attack(most: number): Promise<void> {
  if (queue.length === 0) queue = attacks.toSorted(() => random.next() - 0.5);
  const name = (attackNow = queue.pop() as string);
  const seconds = Math.min(ATTACKS[name]?.seconds ?? most, most);
  const flags = ["--attack", name, "--url", relayUrl, "--seconds", String(seconds), "--json"];
  await welcomes();
  await using child = new Child(script("siege.ts", ...flags));
  const code = await within(child.exited, `the end of ${name}`, seconds * 1000 + 2 * EXTRA_MS).catch(
    (error: TooLate) => error.message,
  );
  const line = child.lines.find((text) => text.startsWith("{"));
  attackNow = "";
  if (line === undefined) return fault(`siege ${name}: ${code}: ${child.lines.slice(-2).join(" | ")}`);
  const row = JSON.parse(line) as Row;
  rows.push(row);
  for (const [when, seen] of Object.entries({ meanwhile: row.report, afterwards: row.later }))
    if (seen == null || seen.lost > 0 || seen.cut > 0)
      fault(`siege ${name}: ${when} the neighbour lost ${seen?.lost ?? "all"}, ${seen?.cut ?? "all"} of its members were cut`);
}

/** So long everybody plays, attacks and looks. */
async function phase(seconds: number, proxyUrl: string): Promise<void> {
  const end = performance.now() + seconds * 1000;
  await welcomes();
  const trialSeconds = Math.max(1, seconds / WARM_UP - 4);
  const [soak, fuzz] = await Promise.all([
    startTrial("soak", proxyUrl, trialSeconds),
    startTrial("fuzz", relayUrl, trialSeconds),
  ]);
  const sieges = async () => {
    do await attack(Math.max(1, Math.round(seconds / 6)));
    while (performance.now() < end && relay?.exitCode === null);
  };
  const [soaked, fuzzed] = await Promise.all([
    judgeTrial("soak", soak, trialSeconds),
    judgeTrial("fuzz", fuzz, trialSeconds),
    sieges(),
  ]);
  say(soaked);
  say(fuzzed);
}

async function main(): Promise<void> {
  await startRelay();
  const proxy = stack.use(await nginx.start(port, { "events {}": "events { worker_connections 8192; }" }));
  const alerts = stack.use(await Alerts.start(relayUrl, begun));
  const command = script("everything/parties.ts", proxy.url, String(parties), String(minutes));
  const guests = stack.use(new Part(command));
  const ask = (line: string) => guests.ask<Report>(line, WHOLE_MS);
  let seen = await ask("whole");
  say(`seed ${seed}: ${parties} parties play, the relay is at ${relayUrl}, nginx at ${proxy.url}`);
  const progress = setInterval(async () => {
    seen = await ask("look").catch(() => seen);
    const { rss = 0, lag = 0, clients = 0, up = false } = watch.last ?? {};
    const state = up ? `${mebi(rss)} MiB, lag ${(lag * 1000).toFixed(0)} ms, ${clients} clients` : "the relay is away";
    say(
      `${watch.life.name}, ${attackNow || "no"} attack; ${state}; parties: ${seen.delivered} heard, ${seen.lost} lost, ` +
        `worst ${ms(seen.worstMs)} ms; alerts: ${alerts.active}; ${faults.length} faults`,
    );
  }, PROGRESS_MS);

  const killAt = Math.min(restarts, 2); // amid the restarts
  const ends = [...Array<string>(restarts).fill("restart").toSpliced(killAt, 0, "kill")];
  const seconds = (minutes * 60) / (ends.length + 1);
  for (const how of ends) {
    await phase(seconds, proxy.url);
    await welcomes();
    const heckler = await startTrial("fuzz", relayUrl, 60); // what it finds says nothing: its bystanders go with the relay
    await ask("may-end");
    await (how === "kill" ? endRelay(how, "SIGKILL", PATIENCE_MS) : endRelay(how, "SIGTERM", drainSeconds * 1000 + PATIENCE_MS));
    await heckler[Symbol.asyncDispose]();
    await startRelay();
    await ask("whole");
  }
  await phase(seconds, proxy.url);
  const last = await ask("finish");
  clearInterval(progress);
  const isEmpty = async () => {
    const { rooms, clients } = await vitals(relayUrl);
    return rooms === 0 && clients === 0;
  };
  await until("rooms and members to be gone", isEmpty, EMPTY_MS).catch((error: Error) => fault(error.message));
  await endRelay("the end", "SIGTERM", drainSeconds * 1000 + PATIENCE_MS);
  await alerts.look();

  if (proxy.process.exitCode !== null) fault("nginx has ended");
  if (alerts.process.exitCode !== null) fault("Prometheus has ended");
  for (const text of last.faults) fault(`ordinary parties: ${text}`);
  if (last.lost > 0) fault(`ordinary parties: ${last.lost} deliveries were lost`);
  const { lines: alertLines, faults: ofAlerts } = judge(watch.judge(), alerts.all);
  ofAlerts.forEach(fault);
  const head = `${now()} s, seed ${seed}`;
  console.log(`\n${report({ head, lives: watch.lives, endings, parties: last, sieges: rows, alertLines, faults })}`);
}

for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => process.exit(2));
try {
  await main();
  process.exitCode = faults.length === 0 ? 0 : 1;
} catch (error) {
  console.error(`it couldn't go on: ${(error as Error).stack}`);
  for (const line of relay?.lines.slice(-5) ?? []) console.error(`the relay's log: ${line}`);
  process.exitCode = 2;
}
await stack.disposeAsync();
process.exit();
