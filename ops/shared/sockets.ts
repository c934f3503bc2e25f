/** TCP sockets for tests and tools that do what no WebSocket client does: raw bytes, odd frames, half-closes, resets, pauses. */

/** What `clientFrame` may do otherwise than a WebSocket client does. */
type FrameOptions = {
  /** 1, text, if absent. */
  opcode?: number;
  fin?: boolean;
  /** The three reserved bits, 0 to 7. */
  reserved?: number;
  /** Four bytes; with zeros the payload can be read, and changed, in the frame. No mask at all if false. */
  mask?: readonly [number, number, number, number] | false;
  /** The length that the header declares; the payload's if absent. */
  length?: number | bigint;
  /** Bytes in which the length is written; the shortest form if absent. */
  lengthBytes?: 0 | 2 | 8;
};

const MASK = [0x9a, 0x3c, 0x51, 0xe7] as const;

/** The bytes of one WebSocket frame as a client writes it, or as it must not. */
export function clientFrame(payload: string | Uint8Array, options: FrameOptions = {}): Buffer {
  const { opcode = 1, fin = true, reserved = 0, mask = MASK } = options;
  const body = Buffer.from(payload as string);
  const length = BigInt(options.length ?? body.length);
  const lengthBytes = options.lengthBytes ?? (length < 126n ? 0 : length < 65536n ? 2 : 8);
  const header = Buffer.alloc(2 + lengthBytes + (mask ? 4 : 0));
  header[0] = (fin ? 0x80 : 0) | (reserved << 4) | opcode;
  header[1] = (mask ? 0x80 : 0) | (lengthBytes === 0 ? Number(length & 127n) : lengthBytes === 2 ? 126 : 127);
  if (lengthBytes === 2) header.writeUInt16BE(Number(length & 0xffffn), 2);
  if (lengthBytes === 8) header.writeBigUInt64BE(BigInt.asUintN(64, length), 2);
  if (mask) {
    header.set(mask, 2 + lengthBytes);
    for (let i = 0; i < body.length; i++) body[i] = (body[i] as number) ^ mask[(i & 3) as 0 | 1 | 2 | 3];
  }
  return Buffer.concat([header, body]);
}

/** The text of an upgrade request; a header set to undefined is left out. */
export function handshake(path = "/", headers: Record<string, string | undefined> = {}): string {
  const all = {
    Host: "relay",
    Upgrade: "websocket",
    Connection: "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    ...headers,
  };
  const lines = Object.entries(all).flatMap(([name, value]) => (value === undefined ? [] : [`${name}: ${value}`]));
  return `GET ${path} HTTP/1.1\r\n${lines.join("\r\n")}\r\n\r\n`;
}

/** A frame from the server. */
type ServerFrame = { opcode: number; payload: Buffer };

/** The first frame of what a server sent, and where it ends; undefined while it isn't complete. */
function readFrame(bytes: Buffer): (ServerFrame & { end: number }) | undefined {
  if (bytes.length < 2) return undefined;
  const short = (bytes[1] as number) & 127;
  const start = short === 126 ? 4 : short === 127 ? 10 : 2;
  if (bytes.length < start) return undefined;
  const length = short === 126 ? bytes.readUInt16BE(2) : short === 127 ? Number(bytes.readBigUInt64BE(2)) : short;
  const end = start + length;
  if (bytes.length < end) return undefined;
  return { opcode: (bytes[0] as number) & 15, payload: bytes.subarray(start, end), end };
}

/** A TCP socket that speaks WebSocket as badly as it is told to: it answers no ping and no close by itself. */
export class RawSocket {
  #socket!: Bun.Socket;
  #unsent = Buffer.alloc(0);
  #received: Buffer[] = [];
  #skim: ((bytes: Buffer) => void) | undefined;
  #wake: (() => void) | undefined;
  #isOver = false;
  readonly #closed = Promise.withResolvers<"closed" | "reset">();

  /** Connects. @throws if nobody listens */
  static async connect(url: string): Promise<RawSocket> {
    const raw = new RawSocket();
    const { hostname, port } = new URL(url);
    const over = (how: "closed" | "reset") => {
      raw.#isOver = true;
      raw.#closed.resolve(how);
      raw.#wake?.();
    };
    raw.#socket = await Bun.connect({
      hostname,
      port: Number(port),
      socket: {
        data(_, bytes) {
          if (raw.#skim !== undefined) return raw.#skim(bytes);
          raw.#received.push(bytes);
          raw.#wake?.();
        },
        drain: () => raw.#flush(),
        close: (_, error) => over(error ? "reset" : "closed"),
        error: () => over("reset"),
      },
    });
    return raw;
  }

  /** Connects and upgrades; a character of the headers is one byte. @throws if the upgrade is refused */
  static async open(url: string, path?: string, headers?: Record<string, string | undefined>): Promise<RawSocket> {
    const raw = await RawSocket.connect(url);
    raw.write(Buffer.from(handshake(path, headers), "latin1"));
    const head = await raw.head();
    if (!head.startsWith("HTTP/1.1 101 ")) throw new Error(`the upgrade was refused: ${head}`);
    return raw;
  }

  /** How the connection ended. */
  get closed(): Promise<"closed" | "reset"> {
    return this.#closed.promise;
  }

  /** What came and hasn't been read. */
  get received(): Buffer {
    const all = Buffer.concat(this.#received);
    this.#received = [all];
    return all;
  }

  /** Hands what came, and all that comes from now on, to `take`, and keeps none of it: for floods. */
  skim(take: (bytes: Buffer) => void): void {
    this.#skim = take;
    take(this.received);
    this.#received = [];
  }

  /** Sends bytes as they are. */
  write(bytes: string | Uint8Array): void {
    this.#unsent = Buffer.concat([this.#unsent, Buffer.from(bytes as string)]);
    this.#flush();
  }

  /** Sends messages, each a masked text frame, in one write. */
  send(...messages: (object | string)[]): void {
    const texts = messages.map((message) => (typeof message === "string" ? message : JSON.stringify(message)));
    this.write(Buffer.concat(texts.map((text) => clientFrame(text))));
  }

  /** The head of an HTTP answer; what follows stays. Empty if the connection ends first. */
  async head(): Promise<string> {
    for (;;) {
      const end = this.received.indexOf("\r\n\r\n");
      if (end >= 0) return this.#take(end + 4).toString("latin1");
      if (this.#isOver) return "";
      await this.#more();
    }
  }

  /** The next frame; undefined if the connection ends first. */
  async nextFrame(): Promise<ServerFrame | undefined> {
    for (;;) {
      const frame = this.#readFrame();
      if (frame !== undefined || this.#isOver) return frame;
      await this.#more();
    }
  }

  /** The next message, pings and all else left out. @throws if the connection ends first */
  async next(): Promise<Record<string, any>> {
    for (;;) {
      const frame = await this.nextFrame();
      if (frame === undefined) throw new Error("the connection ended before a message came");
      if (frame.opcode === 1) return JSON.parse(frame.payload.toString());
    }
  }

  /** Stops reading: the kernel's buffers fill, then the relay's. */
  pause(): void {
    this.#socket.pause();
  }

  resume(): void {
    this.#socket.resume();
  }

  /** Closes with a FIN. */
  end(): void {
    this.#socket.end();
  }

  /** Closes with a reset. */
  reset(): void {
    this.#socket.terminate();
  }

  #flush(): void {
    if (this.#unsent.length === 0 || this.#isOver) return;
    const sent = this.#socket.write(this.#unsent);
    if (sent > 0) this.#unsent = this.#unsent.subarray(sent);
  }

  #more(): Promise<void> {
    return new Promise((resolve) => (this.#wake = resolve));
  }

  #take(bytes: number): Buffer {
    const all = this.received;
    this.#received = [all.subarray(bytes)];
    return all.subarray(0, bytes);
  }

  #readFrame(): ServerFrame | undefined {
    const frame = readFrame(this.received);
    if (frame !== undefined) this.#take(frame.end);
    return frame;
  }
}
