/**
 * What the load tools write and read on the wire. Every payload holds a header, which costs no JSON to write or to read:
 * a "~", the sender's id (3 digits), its sequence number (5) and its send time (5), in base 64. Five digits hold 30 bits: no
 * sequence number gets there, and a time in µs wraps after 18 minutes, which a latency survives.
 */

const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const DIGIT = Uint8Array.from(DIGITS, (digit) => digit.charCodeAt(0));
const VALUE = new Uint8Array(256);
for (const [value, digit] of DIGIT.entries()) VALUE[digit] = value;

/** The header before it is filled in. */
export const HEADER = `~${"A".repeat(13)}`;
const TILDE = 0x7e;
const ID_AT = 1;
const SEQUENCE_AT = 4;
const TIME_AT = 9;
const TIME_MASK = 2 ** 30 - 1;

/** As many members as ids of three digits tell apart. */
export const MAX_MEMBERS = 64 ** 3;

/** Now in whole µs, modulo 2^30. */
export const microsNow = () => (performance.now() * 1000) & TIME_MASK;

/** The µs from one such moment to a later one. */
export const microsBetween = (from: number, to: number) => (to - from) & TIME_MASK;

/** Fills in the header that begins at `at`. */
export function putHeader(bytes: Uint8Array, at: number, id: number, sequence: number, micros: number): void {
  putDigits(bytes, at + ID_AT, 3, id);
  putDigits(bytes, at + SEQUENCE_AT, 5, sequence);
  putDigits(bytes, at + TIME_AT, 5, micros);
}

function putDigits(bytes: Uint8Array, at: number, digits: number, value: number): void {
  for (let i = at + digits - 1; i >= at; i--) {
    bytes[i] = DIGIT[value & 63] as number;
    value >>>= 6;
  }
}

/** The sender's id in the header at `at`. */
export function idIn(bytes: Uint8Array, at: number): number {
  return (digitAt(bytes, at + ID_AT) << 12) | (digitAt(bytes, at + ID_AT + 1) << 6) | digitAt(bytes, at + ID_AT + 2);
}

/** The sequence number in the header at `at`. */
export const sequenceIn = (bytes: Uint8Array, at: number) => fiveDigits(bytes, at + SEQUENCE_AT);

/** The send time in the header at `at`. */
export const timeIn = (bytes: Uint8Array, at: number) => fiveDigits(bytes, at + TIME_AT);

function fiveDigits(bytes: Uint8Array, at: number): number {
  return (
    (digitAt(bytes, at) << 24) |
    (digitAt(bytes, at + 1) << 18) |
    (digitAt(bytes, at + 2) << 12) |
    (digitAt(bytes, at + 3) << 6) |
    digitAt(bytes, at + 4)
  );
}

const digitAt = (bytes: Uint8Array, at: number) => VALUE[bytes[at] as number] as number;

/** What a relay puts before the data, but for the sender's slot. */
const MESSAGE_BEFORE_SLOT = '{"type":"message","from":'.length;
const MESSAGE_AFTER_SLOT = ',"data":'.length;

/**
 * Where the header is in a text frame whose payload is from `start` to `end`, the last part perhaps still missing; or -1.
 * @param inData where it is in `data`
 */
export function findHeader(bytes: Buffer, start: number, end: number, inData: number): number {
  const last = Math.min(end, bytes.length) - HEADER.length;
  // Where it is unless a relay writes otherwise; the slot has one to three digits.
  const usual = start + MESSAGE_BEFORE_SLOT + MESSAGE_AFTER_SLOT + inData;
  for (let at = usual + 1; at <= usual + 3 && at <= last; at++) if (bytes[at] === TILDE) return at;
  if (end > bytes.length) return -1;
  const found = bytes.subarray(start, end).indexOf(TILDE);
  return found < 0 || start + found > last ? -1 : start + found;
}

/** What `data` is: what games send, or what relays may find easier. */
export const PAYLOADS = ["object", "drawing", "string"] as const;

export type Payload = (typeof PAYLOADS)[number];

/** Members of an input, as phones send it. */
const INPUT = ['"x":12.5', '"y":-3.25', '"up":true', '"type":"input"', '"seq":1041'];
/** A piece of a game's state, as hosts send it. */
const PIECE = '{"id":7,"x":12.5,"y":-3.25,"up":true}';

/** JSON text of `bytes` ASCII bytes with the header in it; the shortest that there is, if that is longer. */
export function dataText(payload: Payload, bytes: number): string {
  if (payload === "string") return `"${HEADER}${"x".repeat(Math.max(0, bytes - HEADER.length - 2))}"`;
  const shell = `{"m":"${HEADER}"}`.length;
  let rest = "";
  if (payload === "object") {
    const pieces = Math.floor((bytes - shell - ',"o":[]'.length + 1) / (PIECE.length + 1));
    if (pieces > 1) rest = `,"o":[${Array(pieces).fill(PIECE).join()}]`;
    else for (const member of INPUT) if (shell + rest.length + 1 + member.length <= bytes) rest += `,${member}`;
  }
  return `{"m":"${HEADER}${"x".repeat(Math.max(0, bytes - shell - rest.length))}"${rest}}`;
}

/** The fewest bytes that `dataText` gives. */
export const leastBytes = (payload: Payload) => dataText(payload, 0).length;

/** Opcodes of RFC 6455. */
export const TEXT = 1;
export const CLOSE = 8;
export const PING = 9;
export const PONG = 10;

/**
 * A client's frame, masked with key zero. That is legal, and it leaves the payload readable: a message costs filling in its
 * header in place, which a frame with a real mask doesn't allow.
 */
export function plainFrame(opcode: number, payload: Uint8Array): Buffer {
  const size = payload.length;
  const head = size < 126 ? Buffer.alloc(6) : Buffer.alloc(size < 65536 ? 8 : 14);
  head[0] = 0x80 | opcode;
  head[1] = 0x80 | (size < 126 ? size : size < 65536 ? 126 : 127);
  if (head.length === 8) head.writeUInt16BE(size, 2);
  if (head.length === 14) head.writeBigUInt64BE(BigInt(size), 2);
  return Buffer.concat([head, payload]);
}

/** A text frame as `plainFrame` makes it. */
export const textFrame = (text: string) => plainFrame(TEXT, Buffer.from(text));
