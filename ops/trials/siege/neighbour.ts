/**
 * A room that wants no more than to play: how long do its messages take, and does one get lost? As a process of its own it
 * takes the lines `begin`, `look` and `report`.
 */
import { Client } from "../../shared/client.ts";
import { PATIENCE_MS } from "../../shared/wait.ts";
import { HONEST } from "./crowd.ts";

/** How many play, and hear each message. */
export const MEMBERS = 3;
const EVERY_MS = 10; // half of what the limits allow, so that what a standstill gathered may catch up
const WAIT_MS = 30_000; // for what is late

/** What became of a neighbour's messages. */
export type Report = {
  sent: number;
  /** Deliveries that never came, or came out of order. */
  lost: number;
  /** Members whose socket the relay closed. */
  cut: number;
  worstMs: number;
  p99Ms: number;
  /** How late its own timer was at worst: no figure below this says anything about the relay. */
  ownMs: number;
};

/** Numbers its messages, and notes when each was sent and how long each delivery took. */
export class Neighbour {
  readonly #sentAt: number[] = [];
  /** The number that each member must hear next. */
  readonly #next = Array<number>(MEMBERS).fill(0);
  /** Where the present measurement began. */
  #from = 0;
  #waits: number[] = [];
  #lost = 0;
  #cut = 0;
  #ownMs = 0;
  #timer: Timer | undefined;

  private constructor(readonly members: Client[]) {
    members.forEach((member, i) => void this.#listen(member, i));
  }

  static async open(url: string): Promise<Neighbour> {
    const host = await Client.open(url, HONEST);
    const room = await host.create(MEMBERS);
    const members = [host];
    for (let i = 1; i < MEMBERS; i++) {
      const guest = await Client.open(url, HONEST);
      const { type, message } = await guest.join(room, `guest ${i}`);
      if (type !== "joined") throw new Error(`the neighbour's guest got ${message}`);
      members.push(guest);
    }
    return new Neighbour(members);
  }

  /** Sends messages until `report`. */
  begin(): void {
    this.#from = this.#sentAt.length;
    this.#waits = [];
    this.#lost = 0;
    this.#ownMs = 0;
    let last = performance.now();
    this.#timer = setInterval(() => {
      const now = performance.now();
      this.#ownMs = Math.max(this.#ownMs, now - last - EVERY_MS);
      last = now;
      this.members[0]?.send({ type: "send", data: this.#sentAt.length, echo: true });
      this.#sentAt.push(now);
    }, EVERY_MS);
  }

  /** The measurement so far. What hasn't come yet counts with its age, and as lost. */
  look(): Report {
    const now = performance.now();
    const missing = this.#next.flatMap((next) => this.#sentAt.slice(Math.max(next, this.#from)));
    const waits = [...this.#waits, ...missing.map((at) => now - at)].sort((a, b) => a - b);
    return {
      sent: this.#sentAt.length - this.#from,
      lost: this.#lost + missing.length,
      cut: this.#cut,
      worstMs: waits.at(-1) ?? NaN,
      p99Ms: waits[Math.floor(waits.length * 0.99)] ?? NaN,
      ownMs: this.#ownMs,
    };
  }

  /** Sends no more, and waits for what is under way. */
  async report(): Promise<Report> {
    clearInterval(this.#timer);
    const end = performance.now() + WAIT_MS;
    while (this.#cut === 0 && this.#next.some((next) => next < this.#sentAt.length) && performance.now() < end)
      await Bun.sleep(5);
    return this.look();
  }

  async #listen(member: Client, i: number): Promise<void> {
    try {
      for (;;) {
        const { type, data } = await member.next();
        if (type !== "message") continue;
        if (data !== this.#next[i]) this.#lost++;
        this.#next[i] = data + 1;
        if (data >= this.#from) this.#waits.push(performance.now() - (this.#sentAt[data] ?? NaN));
      }
    } catch {
      this.#cut++;
    }
  }
}

if (import.meta.main) {
  const [url = ""] = Bun.argv.slice(2);
  const neighbour = await Neighbour.open(url);
  setTimeout(() => process.exit(3), 20 * PATIENCE_MS); // nobody may have told it to end
  console.log("ready");
  for await (const line of console) {
    if (line === "begin") neighbour.begin();
    if (line === "look") console.log(JSON.stringify(neighbour.look()));
    if (line === "report") console.log(JSON.stringify(await neighbour.report()));
  }
  process.exit(0);
}
