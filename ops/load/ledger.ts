/** Counts what arrives, how late, and what is wrong with it: lost, doubled, out of order, or not for whoever got it. */
import { Histogram } from "./histogram.ts";
import type { Member, Room } from "./members.ts";
import type { Traffic } from "./traffic.ts";
import { idIn, microsBetween, sequenceIn, timeIn } from "./wire.ts";

export class Ledger {
  sent = 0;
  /** Deliveries that all sent messages must cause. */
  due = 0;
  delivered = 0;
  doubled = 0;
  outOfOrder = 0;
  /** Reached a member that it wasn't for. */
  astray = 0;
  readonly #traffic: Traffic;
  readonly #senders: number;
  /** By receiver and sender: the sequence number that comes next. */
  readonly #next: Uint32Array;
  /** By the same: those that were skipped. */
  readonly #missing = new Map<number, Set<number>>();
  #latency = new Histogram();

  constructor(traffic: Traffic, members: number) {
    this.#traffic = traffic;
    this.#senders = traffic.senders;
    this.#next = new Uint32Array(members * traffic.senders);
  }

  /** Counts messages that go out together, all from one member. */
  send(member: Member, count: number): void {
    const deliveries = count * this.#traffic.fan(member.place);
    this.sent += count;
    this.due += deliveries;
    member.room.outstanding += deliveries;
  }

  /** Counts the message with the header at `at`, all of which has reached the member at `now`. */
  deliver(member: Member, bytes: Buffer, at: number, now: number): void {
    const { room } = member;
    const place = idIn(bytes, at) - room.firstId;
    if (place < 0 || !this.#traffic.reaches(place, member.place)) {
      this.astray++;
      return;
    }
    this.delivered++;
    room.outstanding--;
    this.#latency.record(microsBetween(timeIn(bytes, at), now));
    const sequence = sequenceIn(bytes, at);
    const pair = member.id * this.#senders + place;
    if (sequence === this.#next[pair]) this.#next[pair] = sequence + 1;
    else this.#irregular(pair, sequence);
  }

  /** A sequence number that isn't the next one: some are skipped, or it is one of those, or it was here before. */
  #irregular(pair: number, sequence: number): void {
    const next = this.#next[pair] as number;
    let missing = this.#missing.get(pair);
    if (sequence > next) {
      if (!missing) this.#missing.set(pair, (missing = new Set()));
      for (let each = next; each < sequence; each++) missing.add(each);
      this.#next[pair] = sequence + 1;
    } else if (missing?.delete(sequence)) this.outOfOrder++;
    else this.doubled++;
  }

  /** Deliveries that may still come. One that came twice stands for no other. */
  get pending(): number {
    return this.due - (this.delivered - this.doubled);
  }

  /** Latencies since this was called before. */
  takeLatency(): Histogram {
    const latency = this.#latency;
    this.#latency = new Histogram();
    return latency;
  }

  /** Deliveries that haven't come. */
  lost(rooms: Room[]): number {
    let lost = 0;
    for (const missing of this.#missing.values()) lost += missing.size;
    for (const { members } of rooms)
      for (const sender of members.slice(0, this.#senders))
        for (const { id, place } of members)
          if (this.#traffic.reaches(sender.place, place))
            lost += sender.sent - (this.#next[id * this.#senders + sender.place] as number);
    return lost;
  }
}
