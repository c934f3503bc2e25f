/**
 * A trial of a relay: workers do to it what the fuzzer or the soak makes up, while bystanders play in rooms of their own. It
 * is passed if, at the end, the relay lives, the bystanders' messages all arrived in order, no room, member or socket is left,
 * and memory is where it was after the warm-up; on a relay that others use, too (`--shared`), only the first two. The same seed makes the same choices; only their timing differs.
 */
import { existsSync, readdirSync, readlinkSync } from "node:fs";
import { Client } from "../shared/client.ts";
import { badUsage, readFlags } from "../shared/flags.ts";
import { type Vitals, vitals } from "../shared/metrics.ts";
import { RelayProcess } from "../shared/processes.ts";
import { Random } from "../shared/random.ts";
import { TooLate, until } from "../shared/wait.ts";

const SLACK_BYTES = 16 * 1024 * 1024; // how far memory may end from where it began
const SETTLE_MS = 30_000; // a paused flooder's queue empties at the refill rate, a lingering room takes its time
const ARRIVE_MS = 5_000; // for what bystanders sent last
const WARM_UP_SHARE = 1 / 4; // of the time, and before it: caches, the heap, the tables of addresses and origins fill
const WARM_UP_LEAST = 1; // seconds
const PROGRESS_MS = 5_000;

// ---------------------------------------------------------------------------------------------------------
// Bystanders
// ---------------------------------------------------------------------------------------------------------

const ROOMS = 3;
const MEMBERS = 4;
const EVERY_MS = 40;

type Member = {
  client: Client;
  index: number;
  sent: number;
  /** How many messages came, by their sender's index. */
  got: number[];
  /** A hash of what came, in its order: the same for all of a room. */
  order: number;
};

/** Rooms that only want to play: their members number their messages and count those of the others. */
class Bystanders {
  readonly faults = new Set<string>();
  /** The first one's room; attackers may come and go there. */
  sharedRoom = "";
  sent = 0;
  /** The longest that a message took since the last reading, ms. */
  worstMs = 0;
  readonly #rooms: Member[][] = [];
  #timer: Timer | undefined;
  #leaving = false;

  static async start(url: string): Promise<Bystanders> {
    const bystanders = new Bystanders();
    for (let r = 0; r < ROOMS; r++) {
      const members: Member[] = [];
      bystanders.#rooms.push(members);
      let code = "";
      for (let index = 0; index < MEMBERS; index++) {
        const client = await Client.open(url, { "X-Forwarded-For": "192.0.2.1" });
        if (index === 0) code = await client.create(1000, crypto.randomUUID());
        else await client.join(code, crypto.randomUUID());
        const member = { client, index, sent: 0, got: Array<number>(MEMBERS).fill(0), order: 0 };
        members.push(member);
        void bystanders.#listen(r, member);
      }
      bystanders.sharedRoom ||= code;
    }
    bystanders.#timer = setInterval(() => bystanders.#say(), EVERY_MS);
    return bystanders;
  }

  /** Waits until what was sent has arrived, and leaves. */
  async finish(): Promise<void> {
    clearInterval(this.#timer);
    const isWhole = (members: Member[]) => members.every(({ got }) => got.every((count, from) => count === members[from]?.sent));
    await comesTo(() => this.#rooms.every(isWhole), ARRIVE_MS);
    this.#leaving = true;
    for (const [r, members] of this.#rooms.entries()) {
      if (!isWhole(members)) this.faults.add(`bystander room ${r} misses messages: ${members.map(tally).join("; ")}`);
      else if (members.some(({ order }) => order !== members[0]?.order))
        this.faults.add(`the members of bystander room ${r} saw different orders`);
    }
    await Promise.all(this.#rooms.flat().map(({ client }) => client.close()));
  }

  #say(): void {
    for (const member of this.#rooms.flat()) {
      const data = { n: member.sent++, at: performance.now() };
      member.client.send({ type: "send", data, echo: true });
      this.sent++;
    }
  }

  async #listen(room: number, member: Member): Promise<void> {
    try {
      for (;;) {
        const { type, from, data } = await member.client.next();
        if (type !== "message" || from >= MEMBERS) continue; // an attacker's
        if (data.n !== member.got[from])
          this.faults.add(`bystander ${member.index} of room ${room} got ${data.n} of ${from} after ${member.got[from]}`);
        member.got[from] = data.n + 1;
        member.order = (Math.imul(member.order, 31) + from + 1) | 0;
        this.worstMs = Math.max(this.worstMs, performance.now() - data.at);
      }
    } catch (error) {
      if (!this.#leaving) this.faults.add(`bystander ${member.index} of room ${room}: ${(error as Error).message}`);
    }
  }
}

function tally({ index, sent, got }: Member): string {
  return `${index} sent ${sent}, got ${got.join(" ")}`;
}

// ---------------------------------------------------------------------------------------------------------
// The trial
// ---------------------------------------------------------------------------------------------------------

/** What a worker of a trial gets. */
export type Arena = {
  url: string;
  random: Random;
  /** Whether it is time to leave. */
  isOver(): boolean;
  /** Codes of rooms to meet in; workers add theirs, the oldest go. */
  rooms: string[];
  /** Says that the relay did what it must not. */
  fault(text: string): void;
  /** Counts a piece of work, for the progress line. */
  count(what: string): void;
};

export type Trial = {
  name: string;
  /** How long, after a warm-up of a fourth of it. */
  seconds: number;
  seed: number;
  /** The relay; one of its own if absent. */
  url?: string | undefined;
  /** Others use that relay, too: what is left there at the end, and its memory, say nothing about this trial. */
  shared?: boolean | undefined;
  /** The environment of its own relay. */
  env?: Record<string, string>;
  /** Another server.ts than this one. */
  server?: string | undefined;
  workers: number;
  /** What each of the workers does until `isOver()`. */
  work(arena: Arena): Promise<void>;
  /** Takes progress lines. */
  log(line: string): void;
};

/** The relay that a trial is put through. */
export type Where = Pick<Trial, "url" | "server" | "shared">;

/** Runs a trial. @returns what the relay did wrong, a line each; none if it passed */
export async function trial({ url, env = {}, server, ...settings }: Trial): Promise<string[]> {
  if (url !== undefined) return attend(url, undefined, settings);
  await using child = await RelayProcess.start(env, server);
  return await attend(child.url, child, settings);
}

async function attend(url: string, child: RelayProcess | undefined, settings: Trial): Promise<string[]> {
  const { name, seconds, seed, workers, log, shared = false } = settings;
  const faults = new Set<string>();
  const socketsBefore = child === undefined ? 0 : openSockets(child.pid);
  const before = await vitals(url);
  const bystanders = await Bystanders.start(url);
  log(`${name} seed=${seed} begins`);
  const begun = performance.now();
  const counts = new Map<string, number>();
  let rss = before.rssBytes;

  const line = () => {
    const work = [...counts].map(([what, n]) => `${what}=${n}`).join(" ");
    const passed = ((performance.now() - begun) / 1000).toFixed(0);
    const late = bystanders.worstMs.toFixed(0);
    log(
      `${name} seed=${seed} ${passed}s ${work} bystanders=${bystanders.sent} worst=${late}ms rss=${mebi(rss)}MiB faults=${faults.size + bystanders.faults.size}`,
    );
    bystanders.worstMs = 0;
  };
  const progress = setInterval(async () => {
    rss = (await vitals(url).catch(() => before)).rssBytes;
    line();
  }, PROGRESS_MS);

  const act = async (part: number, partSeconds: number) => {
    const end = performance.now() + partSeconds * 1000;
    const rooms = [bystanders.sharedRoom];
    const jobs = Array.from({ length: workers }, async (_, worker) => {
      const arena: Arena = {
        url,
        random: new Random(seed * 65_537 + part * 1_009 + worker),
        isOver: () => performance.now() > end || faults.size > 20,
        rooms,
        fault: (text) => void faults.add(text),
        count: (what) => counts.set(what, (counts.get(what) ?? 0) + 1),
      };
      await settings.work(arena).catch((error: Error) => faults.add(`worker ${worker}: ${error.stack}`));
    });
    await Promise.all(jobs);
  };
  const settles = (isSo: (now: Vitals) => boolean): Promise<boolean> =>
    comesTo(async () => {
      const now = await vitals(url);
      rss = now.rssBytes;
      return isSo(now);
    }, SETTLE_MS);
  const alone = (now: Vitals) => now.rooms === before.rooms + ROOMS && now.clients === before.clients + ROOMS * MEMBERS;

  try {
    await act(0, Math.max(WARM_UP_LEAST, seconds * WARM_UP_SHARE));
    if (!shared) await settles(alone);
    const rssWarm = rss;
    await act(1, seconds);
    if (!shared && !(await settles(alone))) faults.add("rooms or members of those who went are left");
    if (!shared && !(await settles((now) => now.rssBytes <= rssWarm + SLACK_BYTES)))
      faults.add(`memory grew from ${mebi(rssWarm)} to ${mebi(rss)} MiB`);
    await bystanders.finish();
    const empty = `rooms: ${before.rooms}\nclients: ${before.clients}\n`;
    const isEmpty = (now: Vitals) => now.rooms === before.rooms && now.clients === before.clients;
    if (!shared && !(await settles((now) => isEmpty(now) && (now.text === empty || child === undefined))))
      faults.add(`not empty at the end: ${JSON.stringify(await vitals(url))}`);
    const { internalErrors } = await vitals(url);
    if (internalErrors !== before.internalErrors) faults.add(`${internalErrors - before.internalErrors} exceptions in the relay`);
    if (child !== undefined) await checkProcess(child, socketsBefore, faults);
    log(`${name} seed=${seed} memory after the warm-up ${mebi(rssWarm)}, at the end ${mebi(rss)} MiB`);
  } catch (error) {
    faults.add(`the relay doesn't answer: ${(error as Error).message}`);
    for (const text of child?.lines.slice(-5) ?? []) faults.add(`its log: ${text}`);
  } finally {
    clearInterval(progress);
  }
  line();
  return [...faults, ...bystanders.faults];
}

/** A relay that nobody uses holds no socket, and ends at once when it is told to. */
async function checkProcess(child: RelayProcess, socketsBefore: number, faults: Set<string>): Promise<void> {
  if (!(await comesTo(() => openSockets(child.pid) <= socketsBefore, SETTLE_MS)))
    faults.add(`${openSockets(child.pid)} sockets are open, ${socketsBefore} were at the start`);
  for (const text of child.lines) if (text.includes(" exception ")) faults.add(`its log: ${text}`);
  const code = await child.stop("SIGTERM");
  if (code !== 0) faults.add(`SIGTERM without rooms: exit ${code}`);
  const end = child.lines.find((text) => text.includes(" drain ends "));
  if (end !== undefined && !end.endsWith(" members=0 roomless=0")) faults.add(`sockets were left: ${end}`);
}

/** Waits until something is so. @returns whether it came to that in time */
async function comesTo(isSo: () => boolean | Promise<boolean>, ms: number): Promise<boolean> {
  try {
    return await until("what should be so", isSo, ms);
  } catch (error) {
    if (error instanceof TooLate) return false;
    throw error;
  }
}

/** Sockets that a process holds open, the listening one too; 0 if the system doesn't say. */
function openSockets(pid: number): number {
  const fds = `/proc/${pid}/fd`;
  const isSocket = (fd: string): boolean => {
    try {
      return readlinkSync(`${fds}/${fd}`).startsWith("socket:");
    } catch {
      return false; // closed meanwhile
    }
  };
  return existsSync(fds) ? readdirSync(fds).filter(isSocket).length : 0;
}

function mebi(bytes: number): string {
  return (bytes / 1024 / 1024).toFixed(1);
}

/** Runs a trial from the command line, and ends the process with 1 if the relay failed. */
export async function main(
  run: (seconds: number, seed: number, log: Trial["log"], at: Where) => Promise<string[]>,
): Promise<void> {
  const usage = "bun run ops/trials/fuzz.ts|ops/trials/soak.ts [--seconds 60] [--seed N] [--url http://… [--shared]]";
  const string = { type: "string" } as const;
  const values = readFlags(usage, { seconds: string, seed: string, url: string, shared: { type: "boolean" } });
  const seconds = Number(values.seconds ?? 60);
  const seed = Number(values.seed ?? crypto.getRandomValues(new Uint16Array(1))[0]);
  if (!(seconds > 0) || !Number.isSafeInteger(seed)) badUsage(usage, "--seconds must be a positive number, --seed a whole one");
  if (values.url !== undefined)
    await vitals(values.url).catch((error: Error) => badUsage(usage, `${values.url} doesn't answer: ${error.message}`));
  console.log(`seed ${seed}`);
  const faults = await run(seconds, seed, console.log, { url: values.url, shared: values.shared });
  for (const fault of faults) console.error(`FAULT ${fault}`);
  console.log(faults.length === 0 ? "passed" : `failed: ${faults.length} faults; seed ${seed}`);
  process.exit(faults.length === 0 ? 0 : 1);
}
