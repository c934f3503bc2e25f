/** TCP connections for the proxy: read one HTTP head, then pass the rest on without looking at it. */
import type { Socket, TCPSocketListener } from "bun";

/** An HTTP head, of a request or a response. `headers` has lower-case names; repeated ones are joined with a comma. */
export type Head = { start: string; lines: string[]; headers: Map<string, string> };

const maxHeadBytes = 64 * 1024;
const headEnd = "\r\n\r\n";

/**
 * One TCP connection. It reads nothing that nobody waits for: `head()` takes the bytes up to the first empty line, `pipe()`
 * those after it. Closing is told once, to `onClose`.
 */
export class Wire {
  closed = false;
  onClose: () => void = () => {};
  #socket: Socket<Wire>;
  #received: Buffer = Buffer.alloc(0);
  #unsent: Buffer = Buffer.alloc(0);
  #gotData: () => void = () => {};
  #onDrain: () => void = () => {};
  #ending = false;

  constructor(socket: Socket<Wire>) {
    this.#socket = socket;
  }

  get remoteAddress(): string {
    return this.#socket.remoteAddress;
  }

  /** The first head on this connection, or null if it closes before, or the head isn't HTTP's or is over 64 KiB. */
  head(): Promise<Head | null> {
    return new Promise((resolve) => {
      const look = (): void => {
        const end = this.#received.indexOf(headEnd);
        if (end === -1 && !this.closed && this.#received.length <= maxHeadBytes) return;
        this.#gotData = () => {};
        if (end === -1) return resolve(null);
        this.#socket.pause();
        const text = this.#received.toString("latin1", 0, end);
        this.#received = this.#received.subarray(end + headEnd.length);
        resolve(parseHead(text));
      };
      this.#gotData = look;
      look();
    });
  }

  /** Writes all of it, now or when the other side has room. */
  write(bytes: Buffer | string): void {
    if (this.closed) return;
    const buffer = typeof bytes === "string" ? Buffer.from(bytes, "latin1") : bytes;
    if (this.#unsent.length > 0) {
      this.#unsent = Buffer.concat([this.#unsent, buffer]);
      return;
    }
    const sent = Math.max(0, this.#socket.write(buffer));
    this.#unsent = buffer.subarray(sent);
  }

  /** Passes on what this side receives until it closes, then ends the other; reads no faster than the other side takes. */
  pipe(to: Wire): void {
    const pass = (): void => {
      if (this.#received.length > 0) to.write(this.#received);
      this.#received = Buffer.alloc(0);
      if (to.#unsent.length > 0) this.#socket.pause();
      if (this.closed) to.end();
    };
    this.#gotData = pass;
    to.#onDrain = () => this.#socket.resume();
    if (!this.closed) this.#socket.resume();
    pass();
  }

  /** Closes once everything written is sent. */
  end(): void {
    this.#ending = true;
    if (this.#unsent.length === 0 && !this.closed) this.#socket.end();
  }

  /** Closes at once. */
  destroy(): void {
    if (!this.closed) this.#socket.terminate();
  }

  /** For the socket's handlers, as are the two below: bytes have come. */
  received(chunk: Buffer): void {
    this.#received = Buffer.concat([this.#received, chunk]);
    this.#gotData();
  }

  drained(): void {
    const rest = this.#unsent;
    this.#unsent = Buffer.alloc(0);
    if (rest.length > 0) this.write(rest);
    if (this.#unsent.length > 0) return;
    if (this.#ending) this.end();
    else this.#onDrain();
  }

  wasClosed(): void {
    if (this.closed) return;
    this.closed = true;
    this.#gotData();
    this.onClose();
  }
}

const handlers = {
  data(socket: Socket<Wire>, chunk: Buffer) {
    socket.data.received(chunk);
  },
  drain(socket: Socket<Wire>) {
    socket.data.drained();
  },
  close(socket: Socket<Wire>) {
    socket.data?.wasClosed();
  },
  error(socket: Socket<Wire>) {
    socket.data?.wasClosed();
  },
};

/** Listens on TCP; `onConnection` gets each connection. Throws if the port is taken. */
export function listen(hostname: string, port: number, onConnection: (wire: Wire) => void): TCPSocketListener<Wire> {
  return Bun.listen<Wire>({
    hostname,
    port,
    socket: {
      ...handlers,
      open(socket) {
        socket.data = new Wire(socket);
        onConnection(socket.data);
      },
    },
  });
}

/** Connects to a literal address. The socket is made before this returns. Resolves to `"timeout"` after `timeoutMs`. */
export function connect(address: string, port: number, timeoutMs: number): Promise<Wire | "refused" | "timeout"> {
  const { promise, resolve } = Promise.withResolvers<Wire | "refused" | "timeout">();
  let late = false;
  const timer = setTimeout(() => {
    late = true;
    resolve("timeout");
  }, timeoutMs);
  const settle = (outcome: Wire | "refused"): void => {
    clearTimeout(timer);
    resolve(outcome);
  };
  Bun.connect<Wire>({
    hostname: address,
    port,
    socket: {
      ...handlers,
      open(socket) {
        socket.data = new Wire(socket);
        if (late) socket.terminate();
        else settle(socket.data);
      },
      connectError: () => settle("refused"),
    },
  }).catch(() => settle("refused"));
  return promise;
}

/** Null if it is not a start line and header fields. */
function parseHead(text: string): Head | null {
  const [start = "", ...lines] = text.split("\r\n");
  const headers = new Map<string, string>();
  for (const line of lines) {
    const colon = line.indexOf(":");
    if (colon < 1) return null;
    const name = line.slice(0, colon).toLowerCase();
    const value = line.slice(colon + 1).trim();
    const before = headers.get(name);
    headers.set(name, before === undefined ? value : `${before},${value}`);
  }
  return { start, lines, headers };
}

/** The head as bytes, with the header fields in `replaced` in place of those it came with; `null` takes one out. */
export function formatHead({ start, lines }: Head, replaced: Record<string, string | null>): string {
  const names = new Set(Object.keys(replaced).map((name) => name.toLowerCase()));
  const kept = lines.filter((line) => !names.has(line.slice(0, line.indexOf(":")).toLowerCase()));
  const added = Object.entries(replaced).flatMap(([name, value]) => (value === null ? [] : [`${name}: ${value}`]));
  return [start, ...kept, ...added].join("\r\n") + headEnd;
}
