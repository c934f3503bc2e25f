/** Sends what the scenario says: each message when it is due, or as many as a room's window lets through. */
import { availableParallelism } from "node:os";
import { Histogram } from "./histogram.ts";
import type { Ledger } from "./ledger.ts";
import type { Batch, Member, Members, Room } from "./members.ts";
import type { Scenario } from "./options.ts";
import type { Schedule, Traffic } from "./traffic.ts";
import { dataText, HEADER, microsNow, putHeader, textFrame } from "./wire.ts";

/**
 * Whether it looks without a pause for what is due, so that it goes out on time: players don't send in bunches of a millisecond.
 * That takes a whole core. If there is only one, which the server needs too, a look each millisecond has to do.
 */
export const SPINS = availableParallelism() > 1;

const WINDOW_BYTES = 256 * 1024; // a quarter of what the relay holds for a member before it cuts it
const WINDOW_MESSAGES = 16;

export class Sender {
  #late = new Histogram();
  readonly #scenario: Scenario;
  readonly #traffic: Traffic;
  readonly #members: Members;
  readonly #ledger: Ledger;
  /** Messages in one write: one, or several if the room is saturated. */
  readonly #batchSize: number;
  /** A room gets another batch once no more than so many deliveries are outstanding. */
  readonly #refillAt: number;
  /** By the slot they are for and the size of their data. */
  readonly #batches = new Map<string, Batch>();
  #isSending = false;

  constructor(scenario: Scenario, traffic: Traffic, members: Members, ledger: Ledger) {
    this.#scenario = scenario;
    this.#traffic = traffic;
    this.#members = members;
    this.#ledger = ledger;
    const fitting = Math.min(WINDOW_MESSAGES, Math.floor(WINDOW_BYTES / traffic.largest));
    const window = scenario.window || Math.max(1, fitting);
    this.#batchSize = scenario.rate === 0 ? Math.ceil(window / 2) : 1;
    this.#refillAt = (window - this.#batchSize) * traffic.fan(0);
  }

  start(): void {
    const rooms = this.#members.rooms.slice(0, this.#scenario.rooms);
    this.#isSending = true;
    if (this.#scenario.rate > 0 || this.#scenario.game !== undefined) return this.#sendOnTime(rooms);
    for (const room of rooms) this.#refill(room);
    this.#members.onRead = (room) => this.#refill(room);
  }

  stop(): void {
    this.#isSending = false;
    this.#members.onRead = undefined;
  }

  /** How late it sent since this was called before. */
  takeLate(): Histogram {
    const late = this.#late;
    this.#late = new Histogram();
    return late;
  }

  #sendOnTime(rooms: Room[]): void {
    const start = performance.now();
    const schedules = this.#traffic.schedules().map((schedule) => new Due(schedule, rooms, start));
    const again = SPINS ? setImmediate : (run: () => void) => setTimeout(run, 1);
    const sendDue = () => {
      const now = performance.now(); // what falls due while it sends has to wait until it has read
      for (const schedule of schedules)
        for (; schedule.at <= now; schedule.next()) {
          this.#late.record(Math.floor((performance.now() - schedule.at) * 1000));
          this.#send(schedule.member);
        }
      if (this.#isSending) again(sendDue);
    };
    sendDue();
  }

  /** Sends as much as the room's window allows; all of one write comes from one sender, the next from the next. */
  #refill(room: Room): void {
    while (room.outstanding <= this.#refillAt) {
      const member = room.members[room.turn] as Member;
      room.turn = (room.turn + 1) % this.#traffic.senders;
      this.#send(member);
    }
  }

  #send(member: Member): void {
    const { bytes, frameSize, headerAt } = (member.batch ??= this.#batchOf(member));
    const now = microsNow();
    for (let at = headerAt; at < bytes.length; at += frameSize) putHeader(bytes, at, member.id, member.sent++, now);
    this.#ledger.send(member, this.#batchSize);
    this.#members.write(member, bytes);
  }

  #batchOf(member: Member): Batch {
    const target = this.#traffic.targetOf(member.place);
    const to = target === undefined ? "" : `"to":${(member.room.members[target] as Member).slot},`;
    const size = this.#traffic.sizeOf(member.id);
    const key = `${to}${size}`;
    let batch = this.#batches.get(key);
    if (batch === undefined) {
      const frame = textFrame(`{"type":"send",${to}"data":${dataText(this.#scenario.payload, size)}}`);
      const bytes = Buffer.concat(Array<Buffer>(this.#batchSize).fill(frame));
      this.#batches.set(key, (batch = { bytes, frameSize: frame.length, headerAt: frame.indexOf(HEADER) }));
    }
    return batch;
  }
}

type Turn = { member: Member; atMs: number };

/** A schedule that goes round and round: whose turn it is, and when. */
class Due {
  at = 0;
  member!: Member;
  readonly #turns: Turn[];
  readonly #intervalMs: number;
  #begun: number;
  #turn = -1;

  constructor({ intervalMs, moments }: Schedule, rooms: Room[], start: number) {
    this.#turns = moments.map(({ room, place, atMs }) => ({ member: rooms[room]?.members[place] as Member, atMs }));
    this.#intervalMs = intervalMs;
    this.#begun = start;
    this.next();
  }

  next(): void {
    if (++this.#turn === this.#turns.length) {
      this.#turn = 0;
      this.#begun += this.#intervalMs;
    }
    const { member, atMs } = this.#turns[this.#turn] as Turn;
    this.member = member;
    this.at = this.#begun + atMs;
  }
}
