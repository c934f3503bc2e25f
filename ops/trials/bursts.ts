/**
 * Rooms in which everybody says far more at once than a turn's share and a bucket allow, while members come, leave, hang up,
 * are lost, replaced and kicked.
 *
 *     bun run ops/trials/bursts.ts --seed 7 --scenes 20
 *
 * In each room a witness stays from the first to the last, and says nothing itself. What it hears is the room's story: all that
 * the others hear must be a part of it without a hole, from their own arrival on, and who is there according to the story must
 * be there. Time is a clock that only this moves, so the rate at which somebody is heard can be told to the message.
 */
import type { RelayHandle } from "../../server.ts";
import { Client, type Frame } from "../shared/client.ts";
import { badUsage, readFlags } from "../shared/flags.ts";
import { readMetric, vitals } from "../shared/metrics.ts";
import { Random } from "../shared/random.ts";
import { TestClock, testRelay } from "../shared/relay.ts";
import { PATIENCE_MS, within } from "../shared/wait.ts";

const ROOMS = 3;
const MOST_MEMBERS = 20;
const RATE = 100; // messages a second
const TICK_MS = 50; // as often as the relay looks after empty buckets
const SETTLE_MS = 120_000; // of the clock, for what takes a third of it
const GOODBYE_MS = 5_000;
const SIZES = [0, 0, 200, 2_000, 20_000, 250_000]; // the last is large if all of a room get it
const ROOM_BYTES = 6_000_000; // of one room's bursts
const ACTS = 20;
const BURST_MS = 2_000; // of the rate, at once
const BEGINNING = new TestClock().now();

/** One thing that somebody in a room heard. */
type Heard = { kind: "message"; from: number; stay: number; n: number } | { kind: "joined" | "left"; index: number };

/** One socket's time in a room, from `join` to whatever ends it. */
class Stay {
  /** How it ends, as far as that was asked for. */
  end: "none" | "leave" | "close" | "lost" = "none";
  endedAt = 0;
  index = -1;
  peers: number[] = [];
  /** What its `join` came to: a socket that replaces another is announced to nobody. */
  isAnnounced = true;
  isOver = false;
  /** Messages to everyone, and those to the witness alone. */
  sent = 0;
  whispered = 0;
  readonly heard: Heard[] = [];
  /** Own messages that it should hear as well. */
  readonly echoed = new Set<number>();

  constructor(
    readonly id: number,
    readonly clientId: string,
    /** Whether its clientId is new to the room. */
    readonly isFirst: boolean,
  ) {}
}

/** A socket, and the stays that it has asked for. */
class Caller {
  readonly coming: Stay[] = [];
  stay: Stay | undefined;
  pongs = 0;
  isClosed = false;
  constructor(
    readonly client: Client,
    /** The socket in whose place it comes, if there is one. */
    readonly old: Caller | undefined,
  ) {}
}

type Room = {
  code: string;
  witness: Caller;
  story: (Heard & { at: number })[];
  whispers: Map<number, number>;
  stays: Stay[];
  /** The present socket of each clientId. */
  callers: Map<string, Caller>;
  barred: Set<string>;
  bytes: number;
};

/** What a scene met. */
export type Burst = { messages: number; stays: number; paused: number };

/**
 * Plays one scene against a fresh relay.
 * @param seed decides all choices; when they meet, the machine decides
 * @throws if somebody hears what it mustn't, or not what it must
 */
export async function runBursts(seed: number): Promise<Burst> {
  const scene = new Scene(seed);
  try {
    return await scene.play();
  } catch (error) {
    throw new Error(`${(error as Error).message}\nAgain: bun run ops/trials/bursts.ts --seed ${seed}`);
  } finally {
    await scene.relay[Symbol.asyncDispose]();
  }
}

class Scene {
  readonly clock = new TestClock();
  readonly relay: RelayHandle;
  readonly dice: Random;
  readonly #rate: number;
  readonly #rooms: Room[] = [];
  /** Sockets that are open already, so that who comes is as quick as who goes. */
  readonly #spare: Client[] = [];
  #pacer!: Client;
  #clientIds = 0;
  #stays = 0;
  #failure: Error | undefined;

  constructor(seed: number) {
    this.dice = new Random(seed);
    this.#rate = this.dice.pick([RATE, 0]);
    const limits = { maxMessagesPerSecond: this.#rate, maxMissesPerMinute: 0, maxBufferedBytes: 0, maxMemoryBytes: 0 };
    this.relay = testRelay({ ...limits, clock: this.clock });
  }

  async play(): Promise<Burst> {
    this.#pacer = await Client.open(this.relay.url);
    for (let n = 0; n < ROOMS; n++) await this.#openRoom();
    for (const room of this.#rooms)
      for (let n = this.dice.pick([4, 8, 18]); n > 0; n--) await this.#come(room, `p${this.#clientIds++}`);
    for (let acts = ACTS; acts > 0; acts--) {
      const room = this.dice.pick(this.#rooms);
      for (let n = this.dice.pick([1, 2, 6, 12]); n > 0; n--) await this.#act(room); // with sockets to spare, all at once
      while (this.#spare.length < 12) this.#spare.push(await Client.open(this.relay.url));
      if (this.dice.chance(0.3)) await this.#pass(this.dice.pick([0, TICK_MS, 1_000]));
    }
    await this.#settle();
    for (const room of this.#rooms) this.#judge(room);
    for (const room of this.#rooms) await this.#close(room);
    const { "": paused = NaN } = await readMetric(this.relay.url, "party_sockets_paused_total");
    return {
      messages: this.#rooms.reduce((sum, { story }) => sum + story.length, 0),
      stays: this.#stays,
      paused,
    };
  }

  async #openRoom(): Promise<void> {
    const witness = await Client.open(this.relay.url);
    const code = await witness.create(100, "witness");
    const room: Room = {
      code,
      witness: new Caller(witness, undefined),
      story: [],
      whispers: new Map(),
      stays: [],
      callers: new Map(),
      barred: new Set(),
      bytes: 0,
    };
    this.#rooms.push(room);
    void this.#witness(room);
  }

  async #witness(room: Room): Promise<void> {
    const next = async () => frameOf(await room.witness.client.nextText().catch(() => undefined));
    for (let frame = await next(); frame !== undefined; frame = await next()) {
      if (frame.type === "message" && frame.data.whisper !== undefined) {
        const { stay, whisper, after } = frame.data;
        const before = room.story.filter((heard) => heard.kind === "message" && heard.stay === stay).length;
        if (before !== after) this.#fail(`whisper ${whisper} of ${stay} came after ${before} messages to everyone, not ${after}`);
        if (whisper !== (room.whispers.get(stay) ?? 0))
          this.#fail(`the witness heard whisper ${whisper} of ${stay} out of order`);
        room.whispers.set(stay, whisper + 1);
      } else {
        if (frame.type === "pong") room.witness.pongs++;
        const heard = read(frame);
        if (heard !== undefined) room.story.push({ ...heard, at: this.clock.now() });
      }
    }
  }

  // ---- acts

  async #act(room: Room): Promise<void> {
    const { dice } = this;
    const present = [...room.callers].filter(([, { stay, coming }]) => (coming.at(-1) ?? stay)?.end === "none");
    const few = present.length < 4;
    const act = dice.weighted({
      arrive: present.length >= MOST_MEMBERS ? 0 : few ? 60 : 10,
      burst: few ? 10 : 30,
      uproar: 10,
      leave: 8,
      hop: 8,
      close: 6,
      lose: 4,
      comeBack: 8,
      kick: 2,
    });
    if (act === "uproar") {
      for (const [, caller] of present) this.#burst(room, caller, (caller.coming.at(-1) ?? caller.stay) as Stay);
      return;
    }
    const someone = present.length > 0 ? dice.pick(present) : undefined;
    if (act === "arrive" || someone === undefined) return this.#come(room, `p${this.#clientIds++}`);
    if (act === "comeBack") {
      // Not while another `join` of the same clientId waits: that one would be the later of the two.
      const waiting = new Set(room.stays.flatMap(({ clientId, index, end }) => (index < 0 && end !== "none" ? clientId : [])));
      for (const [clientId, { coming }] of room.callers) if (coming.length > 0) waiting.add(clientId);
      const known = [...new Set(room.stays.map(({ clientId }) => clientId))].filter(
        (clientId) => !room.barred.has(clientId) && !waiting.has(clientId),
      );
      if (known.length === 0) return;
      return this.#come(room, dice.pick(known));
    }
    const [clientId, caller] = someone;
    const stay = (caller.coming.at(-1) ?? caller.stay) as Stay;
    if (act === "burst" || dice.chance(0.5)) this.#burst(room, caller, stay);
    if (act === "leave" || act === "hop") {
      this.#ends(stay, "leave");
      caller.client.send({ type: "leave" });
      if (act === "hop") this.#join(room, caller, clientId);
    } else if (act === "close") {
      this.#hangsUp(caller, "close");
      void caller.client.close();
    } else if (act === "lose") {
      this.#hangsUp(caller, "lost");
      caller.client.terminate();
    } else if (act === "kick" && stay.index > 0) {
      this.#hangsUp(caller, "lost");
      room.barred.add(clientId);
      room.callers.delete(clientId);
      room.witness.client.send({ type: "kick", index: stay.index });
    }
  }

  #ends(stay: Stay, how: Stay["end"]): void {
    stay.end = how;
    stay.endedAt = this.clock.now();
  }

  /**
   * A socket's end is that of the stays that it has asked for, too. Who is lost before its `join` is answered has replaced nobody,
   * so the old socket goes with it.
   */
  #hangsUp({ stay, coming, old }: Caller, how: Stay["end"]): void {
    if (coming.length > 0) old?.client.terminate();
    for (const each of [stay, ...coming]) if (each !== undefined && !each.isOver) this.#ends(each, how);
  }

  /** A socket joins, for somebody new, somebody who was away, or somebody whose other socket is still there. */
  async #come(room: Room, clientId: string): Promise<void> {
    const old = room.callers.get(clientId);
    if (old !== undefined) this.#hangsUp(old, "lost");
    // Who hung up is still being heard, perhaps; coming back ends that.
    for (const each of room.stays) if (each.clientId === clientId && each.end === "close") each.end = "lost";
    const caller = new Caller(this.#spare.shift() ?? (await Client.open(this.relay.url)), old);
    room.callers.set(clientId, caller);
    void this.#listen(caller);
    this.#join(room, caller, clientId);
  }

  #join(room: Room, caller: Caller, clientId: string): void {
    const stay = new Stay(this.#stays++, clientId, !room.stays.some((other) => other.clientId === clientId));
    room.stays.push(stay);
    caller.coming.push(stay);
    caller.client.send({ type: "join", room: room.code, clientId });
  }

  #burst(room: Room, { client }: Caller, stay: Stay): void {
    const { dice } = this;
    const pad = "x".repeat(dice.pick(SIZES));
    const count = Math.min(dice.pick([5, 50, 150, 400]), Math.floor((ROOM_BYTES - room.bytes) / (pad.length + 50)));
    for (let i = 0; i < count; i++) {
      room.bytes += pad.length + 50;
      if (dice.chance(0.05))
        client.send({ type: "send", data: { stay: stay.id, whisper: stay.whispered++, after: stay.sent }, to: 0 });
      const n = stay.sent++;
      const echo = dice.chance(0.2);
      if (echo) stay.echoed.add(n);
      client.send({ type: "send", data: { stay: stay.id, n, pad }, echo: echo || undefined } as never);
    }
  }

  async #listen(caller: Caller): Promise<void> {
    const next = async () => frameOf(await caller.client.nextText().catch(() => undefined));
    for (let frame = await next(); frame !== undefined; frame = await next()) {
      const { stay } = caller;
      if (frame.type === "joined") {
        caller.stay = caller.coming.shift() as Stay;
        const isAnnounced = caller.stay.isFirst || frame.resumed === true;
        Object.assign(caller.stay, { index: frame.index, peers: frame.peers, isAnnounced });
      } else if (frame.type === "left") {
        if (stay !== undefined) stay.isOver = true;
        caller.stay = undefined;
      } else if (frame.type === "pong") caller.pongs++;
      else if (frame.type === "error") {
        if (frame.code === "kicked") for (const each of caller.coming.splice(0, 1)) each.end = "lost";
        else this.#fail(`a member got ${JSON.stringify(frame)}`);
      } else {
        const heard = read(frame);
        if (heard !== undefined) stay?.heard.push(heard);
      }
    }
    caller.isClosed = true;
    for (const each of [caller.stay, ...caller.coming]) if (each !== undefined) each.isOver = true;
  }

  // ---- time

  async #pass(ms: number): Promise<void> {
    this.clock.advance(ms);
    await within(this.#pacer.ask({ type: "ping" }), "a pong in no room");
  }

  /** Lets time pass until all is said that must be. */
  async #settle(): Promise<void> {
    for (const room of this.#rooms) await this.#until(() => this.#missing(room));
    const open = this.#rooms.flatMap(({ witness, callers }) => [
      witness,
      ...[...callers.values()].filter((caller) => !caller.isClosed),
    ]);
    const pongs = open.map((caller) => caller.pongs);
    for (const { client } of open) client.send({ type: "ping" });
    await this.#until(() =>
      open.some((caller, i) => !caller.isClosed && caller.pongs === pongs[i]) ? "somebody's ping isn't answered" : undefined,
    );
    const clients = this.#rooms.reduce((sum, room) => sum + presentIn(room.story).size, ROOMS);
    const got = (await vitals(this.relay.url)).clients;
    if (got !== clients) this.#fail(`${got} members are connected; ${clients} by what the witnesses heard`);
  }

  /** Lets time pass until nothing is missing. */
  async #until(what: () => string | undefined): Promise<void> {
    const end = this.clock.now() + SETTLE_MS;
    const giveUp = performance.now() + PATIENCE_MS;
    for (let missing = what(); missing !== undefined; missing = what()) {
      if (this.clock.now() > end && performance.now() > giveUp)
        this.#fail(`${missing}, after ${SETTLE_MS / 1000} s of the clock`);
      await this.#pass(TICK_MS);
      await Bun.sleep(1); // the clock mustn't run ahead of pongs that come behind megabytes
      if (this.#failure !== undefined) throw this.#failure;
    }
  }

  /** What a room waits for, if anything. */
  #missing(room: Room): string | undefined {
    const counts = countsOf(room.story);
    for (const stay of room.stays) {
      const { id, sent, end, isOver } = stay;
      if (end === "lost") continue;
      if (end !== "none" && !isOver) return `stay ${id} isn't over (${end})`;
      if (end === "none" && stay.index < 0) return `stay ${id} hasn't joined`;
      if (end === "none" && (counts.get(id) ?? 0) < sent) return `of stay ${id} ${counts.get(id) ?? 0} of ${sent} were heard`;
    }
    const present = presentIn(room.story);
    const should = [...room.callers.values()].flatMap(({ stay }) => (stay?.end === "none" ? stay.index : []));
    const [gone] = should.filter((index) => !present.has(index));
    const [ghost] = [...present].filter((index) => !should.includes(index));
    if (gone !== undefined) return `member ${gone} is there, and the others heard that it left`;
    if (ghost !== undefined) return `nobody heard that member ${ghost} left`;
    return undefined;
  }

  /** The host closes its room in the middle of an uproar: who is in it is closed, and who waits to join is told so. */
  async #close(room: Room): Promise<void> {
    while (this.#spare.length < 6) this.#spare.push(await Client.open(this.relay.url));
    const joiners = this.#spare.splice(0);
    room.bytes = 0;
    const members = [...room.callers.values()].filter(({ stay }) => stay?.end === "none");
    for (const caller of members) this.#burst(room, caller, caller.stay as Stay);
    await this.#pass(0);
    room.witness.client.send({ type: "close_room" });
    for (const joiner of joiners) joiner.send({ type: "join", room: room.code, clientId: `q${this.#clientIds++}` });
    let waiting = members.length + joiners.length;
    for (const { client } of members) void client.closed.then(() => waiting--);
    for (const joiner of joiners)
      void joiner.next().then(async ({ type, code }) => {
        if (type === "joined") await joiner.closed;
        else if (code !== "room_not_found") this.#fail(`who came to a room that was closing got ${code}`);
        waiting--;
      });
    await this.#until(() => (waiting > 0 ? `${waiting} heard nothing of the room's end` : undefined));
    for (const joiner of joiners) joiner.terminate();
  }

  // ---- judging

  #fail(what: string): never {
    throw (this.#failure ??= new Error(what));
  }

  #judge(room: Room): void {
    const { story, stays, whispers } = room;
    const counts = new Map<number, number>();
    const present = new Set<number>();
    for (const heard of story) {
      if (heard.kind === "message") {
        const due = counts.get(heard.stay) ?? 0;
        if (heard.n !== due) this.#fail(`message ${heard.n} of stay ${heard.stay} came where ${due} was due`);
        counts.set(heard.stay, due + 1);
      } else if (heard.kind === "joined") {
        if (present.has(heard.index)) this.#fail(`slot ${heard.index} came, and was there`);
        present.add(heard.index);
      } else if (!present.delete(heard.index)) this.#fail(`slot ${heard.index} went, and wasn't there`);
    }
    for (const stay of stays) {
      const { id, end, endedAt, sent, whispered } = stay;
      const came = [counts.get(id) ?? 0, whispers.get(id) ?? 0];
      const isWhole = came[0] === sent && came[1] === whispered;
      const mayBeCut = end === "lost" || (end === "close" && story.some(({ at }) => at >= endedAt + GOODBYE_MS));
      if (!mayBeCut && !isWhole)
        this.#fail(`of stay ${id} (${end}) ${came} messages and whispers came, ${[sent, whispered]} were sent`);
      if (stay.index >= 0) this.#judgeListener(room, stay);
    }
    if (this.#rate > 0) this.#judgeRate(room);
  }

  /** What somebody heard is a part of the story without a hole, from its arrival on. */
  #judgeListener({ story }: Room, { id, index, heard, peers, end, echoed, isAnnounced }: Stay): void {
    const isFor = (each: Heard) =>
      each.kind === "message" ? each.from !== index || (each.stay === id && echoed.has(each.n)) : each.index !== index;
    const due = story.filter(isFor).map(show);
    const got = heard.map(show);
    const message = heard.findIndex(({ kind }) => kind === "message");
    if (end !== "none" && message < 0) return; // too little to know where that was
    const start = end === "none" ? due.length - got.length : due.indexOf(got[message] as string) - message;
    for (let i = 0; i < got.length; i++)
      if (got[i] !== due[start + i])
        this.#fail(
          `stay ${id} (slot ${index}, ${end}) heard ${got.slice(i, i + 3)} as number ${i}; ` +
            `the witness heard ${due.slice(Math.max(0, start + i), start + i + 3)}`,
        );
    if (!isAnnounced) return;
    // Its own arrival is the last one before that.
    let passed = 0;
    let arrival: { passed: number; present: number[] } | undefined;
    const present = new Set([0]);
    for (const each of story) {
      if (passed > start) break;
      if (each.kind === "joined" && each.index === index) arrival = { passed, present: [...present] };
      if (each.kind === "joined") present.add(each.index);
      if (each.kind === "left") present.delete(each.index);
      if (isFor(each)) passed++;
    }
    const were = arrival?.present.sort((a, b) => a - b).join();
    if (arrival?.passed !== start)
      this.#fail(`stay ${id} (slot ${index}) heard ${start - (arrival?.passed ?? 0)} frames too few`);
    if (were !== peers.join()) this.#fail(`stay ${id} (slot ${index}) met ${peers}; by the story, ${were} were there`);
  }

  /** Nobody is heard faster than the rate allows, whatever sockets it comes with. */
  #judgeRate({ story, stays }: Room): void {
    const clientIdOf = new Map(stays.map(({ id, clientId }) => [id, clientId]));
    const counts = new Map<string, { count: number; since: number }>();
    for (const heard of story) {
      if (heard.kind !== "message") continue;
      const clientId = clientIdOf.get(heard.stay) as string;
      const { count, since } = counts.get(clientId) ?? { count: 0, since: 0 };
      counts.set(clientId, { count: count + 1, since });
      if (count + 1 > (BURST_MS / 1000) * this.#rate + ((heard.at - BEGINNING) * this.#rate) / 1000)
        this.#fail(`${clientId} was heard ${count + 1} times within ${heard.at - BEGINNING} ms`);
    }
  }
}

/** Reads a frame; a member's own message without what pads it. */
function frameOf(text: string | undefined): Frame | undefined {
  return text === undefined ? undefined : (JSON.parse(text.replace(/x{9,}/, "")) as Frame);
}

function read(frame: Frame): Heard | undefined {
  const { type, from, data, index } = frame;
  if (type === "message") return { kind: "message", from, stay: data.stay, n: data.n };
  if (type === "peer_joined") return { kind: "joined", index };
  return type === "peer_left" ? { kind: "left", index } : undefined;
}

function show(heard: Heard): string {
  return heard.kind === "message" ? `${heard.stay}:${heard.n}` : `${heard.kind} ${heard.index}`;
}

/** The slots of a room, without the witness's, according to its story. */
function presentIn(story: readonly Heard[]): Set<number> {
  const present = new Set<number>();
  for (const heard of story) {
    if (heard.kind === "joined") present.add(heard.index);
    if (heard.kind === "left") present.delete(heard.index);
  }
  return present;
}

/** How many messages of each stay a story has. */
function countsOf(story: readonly Heard[]): Map<number, number> {
  const counts = new Map<number, number>();
  for (const heard of story) if (heard.kind === "message") counts.set(heard.stay, (counts.get(heard.stay) ?? 0) + 1);
  return counts;
}

if (import.meta.main) {
  const usage = "bun run ops/trials/bursts.ts [--seed N] [--scenes 1]";
  const values = readFlags(usage, { seed: { type: "string" }, scenes: { type: "string" } });
  const [seed, scenes] = [Number(values.seed ?? Date.now() % 1_000_000), Number(values.scenes ?? 1)];
  if (!Number.isSafeInteger(seed) || !(scenes > 0)) badUsage(usage, "--seed and --scenes must be whole numbers");
  try {
    for (let scene = 0; scene < scenes; scene++) console.log(`seed ${seed + scene}`, await runBursts(seed + scene));
    process.exit(0);
  } catch (error) {
    console.error((error as Error).message);
    process.exit(1);
  }
}
