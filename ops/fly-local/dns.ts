/** Fly.io's internal DNS, as far as one app asks it: which machines there are, and their addresses. */
import type { Socket } from "bun";

/** A machine as its DNS records show it. `address` is an IPv6 address. */
export type DnsMachine = { id: string; region: string; address: string };

type DnsOptions = {
  /** The app whose `<app>.internal` names are served. */
  app: string;
  hostname: string;
  /** 0 takes a free one; the same for UDP and TCP. */
  port: number;
  /** The machines to be seen now: started ones, in any order. */
  machines: () => DnsMachine[];
};

type DnsServer = {
  port: number;
  /** While true, queries are read and never answered. */
  silent: boolean;
  close(): void;
};

type Answer = { rcode: number; records: Buffer[] };

const type = { txt: 16, aaaa: 28, any: 255 };
const noError = 0;
const formatError = 1;
const nameError = 3; // NXDOMAIN
const ttlSeconds = 5; // Fly's
const headerBytes = 12;
const plainUdpBytes = 512; // RFC 1035; more only if the query's OPT record says so
const stringBytes = 255; // a TXT record is a list of strings with one length byte each

/** Serves `vms.`, `regions.`, `<id>.vm.` and `<region>.` names of one app, over UDP and TCP; throws if the port is taken. */
export function startDns(options: DnsOptions): Promise<DnsServer> {
  const server: DnsServer = { port: options.port, silent: false, close: () => {} };

  const reply = (query: Buffer, maxBytes: number): Buffer | null =>
    server.silent || query.length < headerBytes ? null : respond(query, maxBytes, options);

  const tcp = Bun.listen<{ received: Buffer }>({
    hostname: options.hostname,
    port: options.port,
    socket: {
      open(socket) {
        socket.data = { received: Buffer.alloc(0) };
      },
      data(socket, chunk) {
        socket.data.received = Buffer.concat([socket.data.received, chunk]);
        answerFrames(socket, reply);
      },
      error() {}, // a client that went away; there is nobody to tell
    },
  });
  // Both sockets are made before anything is awaited, so that a caller can choose the network namespace they belong to.
  const udp = Bun.udpSocket({
    hostname: options.hostname,
    port: tcp.port,
    socket: {
      data(socket, query, port, address) {
        const message = reply(query, udpLimit(query));
        if (message !== null) socket.send(message, port, address);
      },
      error() {},
    },
  });
  return udp.then((socket) => {
    server.port = tcp.port;
    server.close = () => {
      socket.close();
      tcp.stop(true);
    };
    return server;
  });
}

/** Over TCP each message has its length before it. */
function answerFrames(socket: Socket<{ received: Buffer }>, reply: (query: Buffer, maxBytes: number) => Buffer | null): void {
  for (;;) {
    const { received } = socket.data;
    if (received.length < 2) return;
    const end = 2 + received.readUInt16BE(0);
    if (received.length < end) return;
    socket.data.received = received.subarray(end);
    const message = reply(received.subarray(2, end), 0xffff);
    if (message === null) continue;
    const length = Buffer.alloc(2);
    length.writeUInt16BE(message.length);
    socket.write(Buffer.concat([length, message]));
  }
}

function respond(query: Buffer, maxBytes: number, options: DnsOptions): Buffer {
  const question = readQuestion(query);
  if (question === null) return message(query, query.subarray(0, 0), { rcode: formatError, records: [] }, maxBytes);
  return message(query, question.bytes, lookUp(question.name, question.type, options), maxBytes);
}

/** The records of a name; a name that exists without records of the type asked for is no error. */
function lookUp(name: string, asked: number, { app, machines }: DnsOptions): Answer {
  const suffix = `.${app}.internal`;
  const started = machines();
  if (!name.endsWith(suffix) || started.length === 0) return { rcode: nameError, records: [] };
  const label = name.slice(0, -suffix.length);
  const answer = (recordType: number, records: Buffer[]): Answer => ({
    rcode: noError,
    records: asked === recordType || asked === type.any ? records.map((data) => record(recordType, data)) : [],
  });

  if (label === "vms") return answer(type.txt, [txt(started.map(({ id, region }) => `${id} ${region}`).join(","))]);
  if (label === "regions") {
    return answer(type.txt, [txt([...new Set(started.map(({ region }) => region))].sort().join(","))]);
  }
  const found = started.filter(({ id, region }) => label === `${id}.vm` || label === region);
  if (found.length === 0) return { rcode: nameError, records: [] };
  return answer(
    type.aaaa,
    found.map(({ address }) => ipv6Bytes(address)),
  );
}

function readQuestion(query: Buffer): { name: string; type: number; bytes: Buffer } | null {
  const labels: string[] = [];
  let at = headerBytes;
  for (;;) {
    const length = query[at];
    if (length === undefined || length > 63) return null; // past the end, or a compression pointer
    at += 1;
    if (length === 0) break;
    labels.push(query.toString("latin1", at, at + length));
    at += length;
  }
  if (query.length < at + 4) return null;
  return {
    name: labels.join(".").toLowerCase(),
    type: query.readUInt16BE(at),
    bytes: query.subarray(headerBytes, at + 4),
  };
}

/** The size of answer that the query's OPT record allows. It has an empty name and is the only additional record. */
function udpLimit(query: Buffer): number {
  const question = query.length < headerBytes ? null : readQuestion(query);
  if (question === null) return plainUdpBytes;
  const opt = headerBytes + question.bytes.length;
  const hasOpt = query.length >= opt + 5 && query.readUInt16BE(opt + 1) === 41;
  return hasOpt ? Math.max(plainUdpBytes, query.readUInt16BE(opt + 3)) : plainUdpBytes;
}

function message(query: Buffer, question: Buffer, { rcode, records }: Answer, maxBytes: number): Buffer {
  const length = records.reduce((sum, { length }) => sum + length, headerBytes + question.length);
  const truncated = length > maxBytes;
  const sent = truncated ? [] : records;
  const header = Buffer.alloc(headerBytes);
  header.writeUInt16BE(query.readUInt16BE(0), 0);
  const recursionDesired = query.readUInt16BE(2) & 0x0100;
  header.writeUInt16BE(0x8480 | (truncated ? 0x0200 : 0) | recursionDesired | rcode, 2); // QR, AA, TC, RD, RA
  header.writeUInt16BE(question.length === 0 ? 0 : 1, 4);
  header.writeUInt16BE(sent.length, 6);
  return Buffer.concat([header, question, ...sent]);
}

function record(recordType: number, data: Buffer): Buffer {
  const head = Buffer.alloc(12);
  head.writeUInt16BE(0xc000 | headerBytes, 0); // the name is the question's
  head.writeUInt16BE(recordType, 2);
  head.writeUInt16BE(1, 4); // class IN
  head.writeUInt32BE(ttlSeconds, 6);
  head.writeUInt16BE(data.length, 10);
  return Buffer.concat([head, data]);
}

function txt(text: string): Buffer {
  const bytes = Buffer.from(text);
  const strings: Buffer[] = [];
  for (let at = 0; at < bytes.length; at += stringBytes) {
    const part = bytes.subarray(at, at + stringBytes);
    strings.push(Buffer.from([part.length]), part);
  }
  return Buffer.concat(strings);
}

function ipv6Bytes(address: string): Buffer {
  const [left = "", right] = address.split("::");
  const groups = (part: string): string[] => (part === "" ? [] : part.split(":"));
  const tail = right === undefined ? [] : groups(right);
  const head = groups(left);
  const zeros = Array<string>(8 - head.length - tail.length).fill("0");
  const bytes = Buffer.alloc(16);
  [...head, ...zeros, ...tail].forEach((group, index) => bytes.writeUInt16BE(Number.parseInt(group, 16), index * 2));
  return bytes;
}
