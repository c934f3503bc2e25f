/**
 * Ordinary parties for a long time: rooms are created and joined, players talk, drop out, come back, leave, hand on the host's
 * role, kick, and go home. Everybody checks what arrives.
 *
 *     bun run ops/trials/soak.ts --seconds 60 [--seed 7] [--url http://localhost:3000]
 *
 * The trial, with its bystanders, its checks at the end and its exit code, is that of `ops/trials/trial.ts`.
 */
import type { ClientMessage } from "../../server.ts";
import { Client, type Frame } from "../shared/client.ts";
import { within } from "../shared/wait.ts";
import { type Arena, main, trial, type Trial, type Where } from "./trial.ts";

const FULL_CODE = 1013;
const FULL_MS = 1_000;

/** The relay had no place for a newcomer, which it says with 1013: who comes while others attack it tries again later. */
class Full extends Error {}

/** Somebody at a party. The clientId and the index stay, sockets come and go. */
class Player {
  index = -1;
  sent = 0;
  client!: Client;
  /** The number that the next message of each other must have, if one has come since this socket joined. */
  readonly expected = new Map<number, number>();
  /** What it did last, for whoever looks into a fault. */
  readonly trail: string[] = [];
  readonly #clientId = crypto.randomUUID();
  #wanted: { type: string; resolve(frame: Frame): void } | undefined;

  constructor(
    readonly arena: Arena,
    readonly name: string,
  ) {}

  async open(): Promise<void> {
    const client = await Client.open(this.arena.url);
    this.client = client;
    void this.#listen(client);
  }

  async create(options: object): Promise<string> {
    const message = { type: "create", clientId: this.#clientId, maxClients: 16, ...options } as const;
    const { room, index } = await this.ask(message, "created");
    this.index = index;
    return room;
  }

  /** Takes a slot, which is the same every time. */
  async join(room: string): Promise<void> {
    this.expected.clear();
    const joined = await this.ask({ type: "join", clientId: this.#clientId, room }, "joined");
    if (this.index >= 0 && joined.index !== this.index) this.fault(`got slot ${joined.index} after ${this.index}`);
    this.index = joined.index;
  }

  /** Sends a message and waits for the answer of this type. @throws if none comes */
  async ask(message: ClientMessage, type: string): Promise<Frame> {
    const { promise, resolve } = Promise.withResolvers<Frame>();
    this.#wanted = { type, resolve };
    this.client.send(message);
    const full = this.client.closed.then(({ code }) => (code === FULL_CODE ? Promise.reject(new Full()) : promise));
    return within(Promise.race([promise, full]), type);
  }

  say(): void {
    const did = this.trail.splice(0).join(" ");
    this.client.send({ type: "send", data: { n: this.sent++, did } });
  }

  fault(text: string): void {
    this.arena.fault(`${this.name} (${this.index}): ${text}`);
  }

  async #listen(client: Client): Promise<void> {
    const next = async () => client.next().catch(() => undefined); // whoever closed it looks at how
    for (let frame = await next(); frame !== undefined; frame = await next()) {
      if (client !== this.client) continue; // of a socket that was replaced
      if (frame.type === "message" && frame.data.to === undefined) {
        const { from, data } = frame;
        const expected = this.expected.get(from);
        if (expected !== undefined && data.n !== expected)
          this.fault(`got ${data.n} of ${from}, not ${expected}; ${from} did ${data.did}`);
        this.expected.set(from, data.n + 1);
      } else if (frame.type === "message" && frame.data.to !== this.index) {
        this.fault(`got what was for ${frame.data.to}`);
      } else if (frame.type === "error") {
        if (frame.code !== "peer_away" && frame.code !== "peer_not_found") this.fault(JSON.stringify(frame)); // who just left
      } else if (frame.type === this.#wanted?.type) {
        this.#wanted.resolve(frame);
        this.#wanted = undefined;
      }
    }
  }
}

/** Waits for a socket's end, which must be this one. */
async function endsWith(player: Player, client: Client, code: number): Promise<void> {
  const closed = await within(client.closed, `the close with ${code}`);
  if (closed.code !== code) player.fault(`closed with ${closed.code}, not ${code}`);
}

/** One party, from the first who comes to the last who goes. @param players who is there, for whoever cleans up */
async function party(arena: Arena, players: Player[]): Promise<void> {
  const { random, isOver, count } = arena;
  const options = random.pick([{}, { linger: 1 }, { hostGrace: 60 }, { hostGrace: 60, migrate: true, linger: 1 }]);
  let host = new Player(arena, "the host");
  await host.open();
  players.push(host);
  const room = await host.create(options);
  const other = () => random.pick(players.filter((player) => player !== host));

  async function arrive(): Promise<void> {
    const guest = new Player(arena, "a guest");
    await guest.open();
    players.push(guest);
    await guest.join(room);
  }

  /** What may happen, with how often. */
  const acts: Record<string, [weight: number, act: () => unknown]> = {
    say: [60, () => random.pick(players).say()],
    whisper: [
      8,
      () => {
        const to = random.pick(players).index;
        random.pick(players).client.send({ type: "send", data: { to }, to });
      },
    ],
    arrive: [3, () => (players.length < 8 ? arrive() : undefined)],
    /** After a drop, or while the old socket is still there. */
    return: [
      3,
      async () => {
        const player = random.pick(players);
        const old = player.client;
        const drops = players.length > 1 && random.chance(0.6); // alone, the room would end
        const way = !drops ? "replaced" : random.chance(0.5) ? "terminated" : "closed";
        player.trail.push(way);
        // A reset, or a replacement, discards what the relay hasn't handled yet; a close doesn't.
        if (way !== "closed") await player.ask({ type: "ping" }, "pong");
        if (way === "terminated") old.terminate();
        if (way === "closed") await old.close();
        await player.open();
        await player.join(room);
        if (!drops) await endsWith(player, old, 4000);
      },
    ],
    leave: [
      2,
      async () => {
        if (players.length === 1) return;
        const player = random.pick(players);
        player.trail.push("left");
        await player.ask({ type: "leave" }, "left");
        await player.join(room);
      },
    ],
    setState: [2, () => host.client.send({ type: "set_state", data: { scene: random.below(9) } })],
    setRoom: [1, () => host.ask({ type: "set_room", maxClients: 12 + random.below(5) }, "room")],
    handOn: [
      1,
      async () => {
        if (players.length === 1) return;
        const next = other();
        await host.ask({ type: "set_host", index: next.index }, "host");
        await next.ask({ type: "ping" }, "pong"); // it has seen that, too
        host = next;
      },
    ],
    kick: [
      1,
      async () => {
        if (players.length === 1) return;
        const out = other();
        host.client.send({ type: "kick", index: out.index });
        await endsWith(out, out.client, 4002);
        players.splice(players.indexOf(out), 1);
      },
    ],
    goHome: [
      1,
      async () => {
        if (players.length === 1) return;
        const out = other();
        players.splice(players.indexOf(out), 1);
        await out.client.close();
      },
    ],
  };
  const table = Object.values(acts).flatMap(([weight, act]) => Array<() => unknown>(weight).fill(act));

  for (let n = 1 + random.below(4); n > 0; n--) await arrive();
  for (let n = 40 + random.below(200); n > 0 && !isOver(); n--) {
    await random.pick(table)();
    if (random.chance(0.2)) await Bun.sleep(random.below(20)); // well below the limit of messages
  }

  // All that was sent is on its way once everybody's ping is answered, and has come once a second one is.
  for (const _ of [1, 2]) await Promise.all(players.map((player) => player.ask({ type: "ping" }, "pong")));
  for (const player of players)
    for (const { index, sent } of players) {
      const next = player.expected.get(index);
      if (next !== undefined && next !== sent) player.fault(`got ${next} of ${sent} messages of ${index}`);
    }
  if (random.chance(0.5)) {
    host.client.send({ type: "close_room" });
    await Promise.all(players.map((player) => endsWith(player, player.client, 4001)));
  } else {
    for (const { client } of players) random.chance(0.5) ? client.terminate() : await client.close();
  }
  count("parties");
}

/** Holds parties at a relay for so long. @returns what went wrong */
export function soak(seconds: number, seed: number, log: Trial["log"], at: Where = {}): Promise<string[]> {
  return trial({
    ...{ name: "soak", seconds, seed, log, ...at, workers: 10 },
    async work(arena) {
      while (!arena.isOver()) {
        const players: Player[] = [];
        try {
          await party(arena, players);
        } catch (error) {
          if (!(error instanceof Full && at.shared)) throw error;
          arena.count("full");
          await Bun.sleep(FULL_MS);
        } finally {
          for (const { client } of players) client.terminate();
        }
      }
    },
  });
}

if (import.meta.main) await main(soak);
