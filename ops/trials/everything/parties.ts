/**
 * Ordinary parties whose members do what a client has to: after a close they wait as its code says, and come back with their
 * clientIds; if the room is over, the host makes another. Each message has a number, and everybody hears everybody, themselves
 * too, so each gap is seen. As a process of its own it takes the lines `whole`, `may-end`, `look` and `finish`.
 */
import { Client, type Frame } from "../../shared/client.ts";
import { PATIENCE_MS, until } from "../../shared/wait.ts";

const SIZE = 4;
const EVERY_MS = 250;
const ARRIVE_MS = 10_000; // for what was sent last
const WHOLE_MS = 60_000;
const FEW_FAULTS = 20;

/** What became of all messages so far. */
export type Report = {
  /** Rooms that were made. */
  rooms: number;
  /** Messages, and how often one was heard. */
  sent: number;
  delivered: number;
  /** Deliveries that a room still owed as it ended with its relay. */
  endedWithRoom: number;
  /** Deliveries that a living room owes, or has skipped. */
  lost: number;
  reconnects: number;
  /** The longest that a delivery took since the last look. */
  worstMs: number;
  faults: string[];
};

type Message = { n: number; at: number };

/** One room, from its creation to its end. */
class Game {
  /** Everybody is there, or was. */
  begun = false;
  over = false;
  /** By slot: how many messages it sent. */
  readonly sent = Array<number>(SIZE).fill(0);
  /** By hearer's and sender's slot: the number of the next message; undefined for who came back to a room that went on. */
  readonly next = Array.from({ length: SIZE }, () => Array<number | undefined>(SIZE).fill(0));

  constructor(readonly room: string) {}

  /** Deliveries that haven't come. */
  get owed(): number {
    const of = (next: (number | undefined)[]) =>
      next.reduce<number>((sum, n, from) => sum + (this.sent[from] as number) - (n ?? 0), 0);
    return this.next.reduce((sum, next) => sum + of(next), 0);
  }
}

class Party {
  game: Game | undefined;
  readonly players: Player[];

  constructor(
    readonly parties: Parties,
    readonly name: string,
  ) {
    this.players = Array.from({ length: SIZE }, (_, place) => new Player(this, place));
  }

  /** Everybody sends one message, if everybody is there. */
  say(): void {
    const { game } = this;
    if (game === undefined || game.over) return;
    if (!game.begun && !this.players.every(({ seatedIn }) => seatedIn === game)) return;
    game.begun = true;
    for (const player of this.players) if (player.seatedIn === game) player.say(game);
  }

  /** The room is gone. */
  end(game: Game): void {
    if (game.over) return;
    game.over = true;
    this.parties.report.endedWithRoom += game.owed;
    if (!this.parties.mayEnd) this.parties.fault(`${this.name}: room ${game.room} is gone`);
  }
}

class Player {
  /** Where it sits now. */
  seatedIn: Game | undefined;
  heardAt = 0;
  #slot = -1;
  #client: Client | undefined;
  readonly #clientId = crypto.randomUUID();

  constructor(
    readonly party: Party,
    readonly place: number,
  ) {}

  say(game: Game): void {
    const data: Message = { n: (game.sent[this.#slot] as number)++, at: performance.now() };
    this.#client?.send({ type: "send", data, echo: true });
    this.party.parties.report.sent++;
  }

  leave(): void {
    void this.#client?.close();
  }

  async live(): Promise<void> {
    const { parties } = this.party;
    for (let tries = 0; !parties.isOver; tries++) {
      if (this.place > 0) await this.#invited();
      const { game } = this.party;
      const goesOn = game !== undefined && !game.over;
      const client = await Client.open(goesOn ? `${parties.url}/${game.room}` : parties.url).catch(() => undefined);
      const code = client === undefined ? undefined : await this.#play(client, goesOn ? game : undefined);
      if (parties.isOver) return;
      if (this.seatedIn !== undefined) tries = 0;
      if (this.seatedIn !== undefined && !parties.mayEnd) parties.fault(`${this.party.name}: closed with ${code}`);
      this.seatedIn = undefined;
      parties.report.reconnects++;
      await Bun.sleep(waitAfter(code, tries));
    }
  }

  /** Waits until the host has a room. */
  async #invited(): Promise<void> {
    while (!this.party.parties.isOver && (this.party.game?.over ?? true)) await Bun.sleep(50);
  }

  /** Sits down and listens until the socket closes. @returns its close code */
  async #play(client: Client, game: Game | undefined): Promise<number> {
    this.#client = client;
    const clientId = this.#clientId;
    client.send(
      game === undefined ? { type: "create", clientId, maxClients: SIZE } : { type: "join", clientId, room: game.room },
    );
    try {
      for (;;) this.#take(await client.next(), client, game);
    } catch {
      return (await client.closed).code;
    }
  }

  #take(frame: Frame, client: Client, game: Game | undefined): void {
    const { party } = this;
    const { parties } = party;
    if (frame.type === "created") {
      party.game = new Game(frame.room);
      parties.report.rooms++;
      this.#sit(party.game, frame.index);
    } else if (frame.type === "joined") this.#sit(game as Game, frame.index);
    else if (frame.type === "message") this.#hear(frame.from, frame.data as Message);
    else if (frame.type === "error") {
      if (frame.code === "room_not_found" && game !== undefined) party.end(game);
      else if (frame.code !== "draining") parties.fault(`${party.name}: ${JSON.stringify(frame)}`);
      void client.close(); // and again, after a while
    }
  }

  #sit(game: Game, slot: number): void {
    if (game.begun) game.next[slot] = Array<number | undefined>(SIZE).fill(undefined);
    this.#slot = slot;
    this.seatedIn = game;
  }

  #hear(from: number, { n, at }: Message): void {
    const { report } = this.party.parties;
    const next = (this.seatedIn as Game).next[this.#slot] as (number | undefined)[];
    const expected = next[from] ?? n;
    if (n !== expected) {
      report.lost += Math.max(1, n - expected);
      this.party.parties.fault(`${this.party.name}: ${this.#slot} heard ${n} of ${from}, not ${expected}`);
    }
    next[from] = n + 1;
    report.delivered++;
    this.heardAt = performance.now();
    report.worstMs = Math.max(report.worstMs, this.heardAt - at);
  }
}

/** How long a client waits, by the close code of its socket; none if it wasn't even opened. */
function waitAfter(code: number | undefined, tries: number): number {
  if (code === 1012) return 500 + 2_500 * Math.random();
  if (code === 1013) return 5_000;
  return Math.min(4_000, 250 * 2 ** tries) * (0.5 + Math.random() / 2);
}

/** All parties. */
export class Parties {
  /** Whether the relay is about to end, and rooms and sockets with it. */
  mayEnd = true;
  isOver = false;
  readonly report: Report = { rooms: 0, sent: 0, delivered: 0, endedWithRoom: 0, lost: 0, reconnects: 0, worstMs: 0, faults: [] };
  readonly #all: Party[];
  readonly #timer: Timer;

  constructor(
    readonly url: string,
    count: number,
  ) {
    this.#all = Array.from({ length: count }, (_, i) => new Party(this, `party ${i}`));
    for (const player of this.#players) void player.live();
    this.#timer = setInterval(() => this.#all.forEach((party) => party.say()), EVERY_MS);
  }

  fault(text: string): void {
    if (this.report.faults.length < FEW_FAULTS) this.report.faults.push(text);
  }

  look(): Report {
    const now = { ...this.report };
    this.report.worstMs = 0;
    return now;
  }

  /** Waits until everybody hears somebody: from now on no room may end. */
  async whole(): Promise<Report> {
    const since = performance.now();
    const isWhole = () => this.#players.every(({ seatedIn, heardAt }) => seatedIn?.over === false && heardAt > since);
    await until("all parties to be whole", isWhole, WHOLE_MS).catch((error: Error) => this.fault(error.message));
    this.mayEnd = false;
    return this.look();
  }

  /** Waits for what is under way, and leaves. */
  async finish(): Promise<Report> {
    clearInterval(this.#timer);
    const owed = () => this.#all.reduce((sum, { game }) => sum + (game === undefined || game.over ? 0 : game.owed), 0);
    await until("all that was sent", () => owed() === 0, ARRIVE_MS).catch(() => this.fault(`${owed()} deliveries never came`));
    this.report.lost += owed();
    this.isOver = true;
    for (const player of this.#players) player.leave();
    return this.look();
  }

  get #players(): Player[] {
    return this.#all.flatMap(({ players }) => players);
  }
}

if (import.meta.main) {
  const [url = "", count = "1", minutes = "1"] = Bun.argv.slice(2);
  const parties = new Parties(url, Number(count));
  setTimeout(() => process.exit(3), Number(minutes) * 60_000 + 60 * PATIENCE_MS); // nobody may have told it to end
  for await (const line of console) {
    if (line === "may-end") parties.mayEnd = true;
    if (line === "whole") console.log(JSON.stringify(await parties.whole()));
    else if (line === "finish") console.log(JSON.stringify(await parties.finish()));
    else console.log(JSON.stringify(parties.look()));
    if (line === "finish") break;
  }
  process.exit(0);
}
