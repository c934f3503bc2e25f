/**
 * The siege: attackers who keep within every limit, and a neighbour who wants to play. Is it felt in the neighbour's room?
 *
 *     bun run siege                                        every attack, on a relay of its own each
 *     bun run siege --attack burst,fragments --seconds 10
 *     bun run siege --server ../before/server.ts           another relay, to compare with
 *     bun run siege --url http://localhost:3000            one that runs already, on this machine; your own
 *
 * The relay has one core, the attackers the others; the neighbour is a process of its own with a higher priority than theirs, or
 * it would measure them. Attacks on memory run the relay in a memory cgroup of 256 MB, which needs root. At the end there is a
 * table in Markdown: the longest and the 99th percentile of what a message in the neighbour's room took, how many of its
 * deliveries were lost, what the relay occupied before, at most and afterwards, and what came of the attack. Exit code: 0 if all is as the
 * relay promises, 1 if not, 2 if it could not be tried.
 *
 * The attacks are in `siege/attacks.ts`. `--json` prints a line of JSON for each attack in place of the table.
 */
import { availableParallelism } from "node:os";
import { resolve } from "node:path";
import { badUsage, readFlags } from "../shared/flags.ts";
import { Child, ROOT } from "../shared/processes.ts";
import { PATIENCE_MS, until } from "../shared/wait.ts";
import { Part } from "./part.ts";
import { ATTACKS, type Attack, type Outcome } from "./siege/attacks.ts";
import { type MemoryGroup, memoryGroup, memoryOf } from "./siege/memory.ts";
import { MEMBERS as NEIGHBOURS, type Report } from "./siege/neighbour.ts";

const WORST_MS = 100; // what a message in another room may take
const SETUP_MS = 60_000;
const QUIET_MS = 500; // between the last who arrived and the attack
const SAMPLE_MS = 50; // how often memory is looked at
const PROGRESS_MS = 1_000;
const AFTER_MS = 10_000; // in which memory has to come back
const AFTER_BYTES = 48 * 1024 * 1024; // above where it began: the heap of a process that has worked
const PLAY_MS = 1_000; // for which the neighbour plays on afterwards
const WAIT_MS = 40_000; // for what a standstill holds up
const KILLED = 128 + 9;

/** What one attack did; with `--json` a line each. */
export type Row = {
  name: string;
  /** What the neighbour saw while it went on, and afterwards. */
  report: Report | undefined;
  later: Report | undefined;
  /** The relay's resident memory in bytes; undefined if somebody else has started it. */
  memory: { before: number; peak: number; after: number } | undefined;
  text: string;
  held: boolean;
};

const cores = Bun.which("taskset") === null ? 1 : availableParallelism();
const onCores = (list: string): string[] => (cores > 1 ? ["taskset", "-c", list] : []);
const relayPlace = onCores("0");
const othersPlace = onCores(cores > 2 ? `1-${cores - 1}` : "1");
const neighbourPlace = process.getuid?.() === 0 ? ["nice", "-n", "-10", ...othersPlace] : othersPlace;
const attackersPlace = ["nice", "-n", "10", ...othersPlace];
const script = (name: string): string[] => [process.execPath, "run", `${import.meta.dir}/siege/${name}.ts`];

/** Starts the relay that an attack needs. */
async function startRelay(
  { siblings }: Attack,
  server: string,
  group: MemoryGroup | undefined,
): Promise<Child & { url: string }> {
  const fly = { FLY_APP_NAME: "siege", FLY_REGION: "fra", FLY_MACHINE_ID: "here" };
  const env = { PORT: "0", ADDRESS_HEADER: "X-Forwarded-For", IDLE_EXIT_SECONDS: "60", ...(siblings && fly) };
  const command = siblings ? [...script("relay"), server] : [process.execPath, "run", server];
  const relay = new Child([...(group?.prefix ?? []), ...relayPlace, ...command], { env });
  return Object.assign(relay, { url: `http://127.0.0.1:${await relay.saysPort()}` });
}

type Options = { seconds: number | undefined; server: string; url: string | undefined };

/** Runs one attack. @throws if it can't be made here */
async function siege(name: string, attack: Attack, options: Options): Promise<Row> {
  const { seconds = attack.seconds, server, url } = options;
  if (url !== undefined && attack.siblings) throw new Error("it needs a relay of its own: leave --url out");
  using group = url === undefined && attack.memory !== undefined ? memoryGroup(attack.memory) : undefined;
  await using relay = url === undefined ? await startRelay(attack, server, group) : undefined;
  const relayUrl = relay?.url ?? (url as string);
  await using neighbour = new Part([...neighbourPlace, ...script("neighbour"), relayUrl]);
  if ((await neighbour.next(PATIENCE_MS)) !== "ready") throw new Error(`the neighbour can't play: ${neighbour.lines.join(" ")}`);

  let ended: number | undefined;
  void relay?.exited.then((code) => (ended = code));
  const memoryNow = () => (relay === undefined ? undefined : memoryOf(relay.pid));
  const before = memoryNow()?.now ?? NaN;
  let peak = before;
  const sampling = setInterval(() => (peak = memoryNow()?.peak ?? peak), SAMPLE_MS);
  const began = performance.now();
  const progress = setInterval(async () => {
    const seen = await neighbour.ask<Report>("look", PATIENCE_MS).catch(() => undefined);
    const passed = ((performance.now() - began) / 1000).toFixed(0);
    console.error(`${name} ${passed} s: worst ${ms(seen?.worstMs)} ms, ${seen?.lost ?? "?"} under way, ${mebi(peak)} MiB`);
  }, PROGRESS_MS);
  let outcome: Outcome;
  let report: Report | undefined;
  try {
    await using attackers = new Part([...attackersPlace, ...script("attacks"), name, relayUrl, String(seconds)]);
    outcome = await beginAndEnd(attackers, neighbour, seconds).catch(({ message }: Error) => ({ text: message, held: false }));
    clearInterval(progress);
    report = await neighbour.ask<Report>("report", WAIT_MS).catch(() => undefined);
  } finally {
    clearInterval(progress);
    clearInterval(sampling);
  }
  const isSmall = () => !((memoryNow()?.now ?? 0) > before + AFTER_BYTES); // NaN: it isn't known
  const isBack = await until("the relay's memory to come back", isSmall, AFTER_MS).catch(() => false);
  const after = memoryNow()?.now ?? NaN;
  neighbour.type("begin\n");
  await Bun.sleep(PLAY_MS);
  const later = await neighbour.ask<Report>("report", WAIT_MS).catch(() => undefined);

  const lives = ended === undefined;
  const unhurt = (seen: Report | undefined) => seen !== undefined && seen.lost === 0 && seen.cut === 0;
  const words = [
    ended === undefined ? "" : ended === KILLED ? "**killed**" : `**ended with code ${ended}**`,
    outcome.text,
    isBack || !lives ? "" : "memory didn't come back",
    unhurt(later) || !lives ? "" : "the neighbour couldn't go on",
  ];
  const held = outcome.held && lives && isBack && unhurt(report) && unhurt(later) && (report?.worstMs ?? NaN) <= WORST_MS;
  const memory = relay && { before, peak, after };
  return { name, report, later, memory, text: words.filter(Boolean).join("; "), held };
}

/** Lets the attackers get into place, and then begin. */
async function beginAndEnd(attackers: Part, neighbour: Part, seconds: number): Promise<Outcome> {
  const ready = await attackers.next(SETUP_MS);
  if (ready !== "ready") throw new Error(attackers.lines.join(" "));
  await Bun.sleep(QUIET_MS);
  neighbour.type("begin\n");
  await Bun.sleep(QUIET_MS);
  const [outcome] = await Promise.all([
    attackers.ask<Outcome>("go", seconds * 1000 + WAIT_MS),
    Bun.sleep(PLAY_MS), // so that a short one is measured long enough, too
  ]);
  return outcome;
}

/** Milliseconds to read; NaN, which JSON writes as null, is nothing measured. */
const ms = (value: number | null | undefined): string => (value == null ? "?" : value.toFixed(value < 10 ? 1 : 0));
const mebi = (bytes: number): string => (Number.isNaN(bytes) ? "–" : (bytes / 1024 / 1024).toFixed(0));

/** The rows in Markdown. */
function table(rows: Row[]): string {
  const head = ["attack", "worst ms", "p99 ms", "own ms", "lost", "MiB before", "at most", "after", "what became of it"];
  const cells = rows.map(({ name, report, memory, text, held }) => {
    const sizes = [memory?.before, memory?.peak, memory?.after].map((bytes) => mebi(bytes ?? NaN));
    const lost = report === undefined ? "all" : `${report.lost} of ${report.sent * NEIGHBOURS}`;
    return [name, ms(report?.worstMs), ms(report?.p99Ms), ms(report?.ownMs), lost, ...sizes, `${held ? "" : "✗ "}${text}`];
  });
  const lines = [head, head.map(() => "---"), ...cells].map((row) => `| ${row.join(" | ")} |`);
  return `${lines.join("\n")}\n\nown: how late the neighbour's own timer was at worst; ✗: not as promised`;
}

const USAGE = `bun run siege [--attack NAME,…] [--seconds N] [--server PATH | --url http://…] [--json]
attacks:
${Object.entries(ATTACKS)
  .map(([name, { about }]) => `  ${name.padEnd(14)}${about}`)
  .join("\n")}`;

async function main(): Promise<void> {
  const string = { type: "string" } as const;
  const values = readFlags(USAGE, { attack: string, seconds: string, server: string, url: string, json: { type: "boolean" } });
  const names = values.attack?.split(",") ?? Object.keys(ATTACKS);
  const unknown = names.find((name) => !Object.hasOwn(ATTACKS, name));
  if (unknown !== undefined) badUsage(USAGE, `there is no attack ${unknown}`);
  const seconds = values.seconds === undefined ? undefined : Number(values.seconds);
  if (seconds !== undefined && !(seconds > 0 && seconds <= 600)) badUsage(USAGE, "--seconds must be a number up to 600");
  const options = { seconds, server: resolve(values.server ?? `${ROOT}/server.ts`), url: values.url };
  if (cores === 1) console.error("There is one core, or no taskset: the figures say how all of them share it.");

  const rows: Row[] = [];
  const untried: string[] = [];
  for (const name of names) {
    const row = await siege(name, ATTACKS[name] as Attack, options).catch(({ message }: Error) => {
      untried.push(`${name} wasn't tried: ${message}`);
    });
    if (row && values.json) console.log(JSON.stringify(row));
    if (row) rows.push(row);
  }
  if (!values.json) console.log([...(rows.length > 0 ? [table(rows)] : []), ...untried].join("\n"));
  else if (untried.length > 0) console.error(untried.join("\n"));
  process.exit(untried.length > 0 ? 2 : rows.every(({ held }) => held) ? 0 : 1);
}

if (import.meta.main) await main();
