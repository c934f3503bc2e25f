/** A WebSocket client for tests and tools. */
import type { ClientMessage } from "../../server.ts";

/** A frame from the server, read. */
export type Frame = { type: string } & Record<string, any>;

/** Bun's WebSocket, which takes headers and can end without a close frame; the page's type hides both. */
const BunWebSocket = WebSocket as unknown as new (
  url: string,
  options: { headers: Record<string, string> },
) => WebSocket & { terminate(): void };

/** A WebSocket client that queues what arrives, so that no test misses a frame. */
export class Client {
  readonly #socket: InstanceType<typeof BunWebSocket>;
  readonly #frames: string[] = [];
  readonly #closed = Promise.withResolvers<{ code: number; reason: string }>();
  #wake: (() => void) | undefined;
  #isClosed = false;

  private constructor(socket: InstanceType<typeof BunWebSocket>) {
    this.#socket = socket;
    socket.onmessage = (event) => {
      this.#frames.push(String(event.data));
      this.#wake?.();
    };
    socket.onclose = ({ code, reason }) => {
      this.#isClosed = true;
      this.#closed.resolve({ code, reason });
      this.#wake?.();
    };
  }

  /**
   * Opens a socket. @param url `http://…` or `ws://…`
   * @throws if the upgrade is refused
   */
  static async open(url: string, headers: Record<string, string> = {}): Promise<Client> {
    const socket = new BunWebSocket(url.replace(/^http/, "ws"), { headers });
    const client = new Client(socket);
    await new Promise<void>((resolve, reject) => {
      socket.onopen = () => resolve();
      socket.onerror = () => reject(new Error("the upgrade was refused"));
    });
    return client;
  }

  /** How the socket was closed. */
  get closed(): Promise<{ code: number; reason: string }> {
    return this.#closed.promise;
  }

  /** Sends a message, or a text or bytes as they are. */
  send(message: ClientMessage | string | Uint8Array<ArrayBuffer>): void {
    const raw = typeof message === "string" || message instanceof Uint8Array;
    this.#socket.send(raw ? message : JSON.stringify(message));
  }

  /** The next frame's text. @throws if the socket closes first */
  async nextText(): Promise<string> {
    while (this.#frames.length === 0) {
      if (this.#isClosed) {
        const { code, reason } = await this.closed;
        throw new Error(`closed with ${code} ${reason} before a frame came`);
      }
      await new Promise<void>((resolve) => (this.#wake = resolve));
    }
    return this.#frames.shift() as string;
  }

  /** The next frame. @throws if the socket closes first */
  async next(): Promise<Frame> {
    return JSON.parse(await this.nextText()) as Frame;
  }

  /** Sends a message and gives the next frame. */
  ask(message: ClientMessage | string | Uint8Array<ArrayBuffer>): Promise<Frame> {
    this.send(message);
    return this.next();
  }

  /** All frames up to the answer of a ping that is sent now: what isn't among them was not sent before. */
  async soFar(): Promise<Frame[]> {
    const t = Math.random();
    this.send({ type: "ping", t });
    const frames: Frame[] = [];
    for (;;) {
      const frame = await this.next();
      if (frame.type === "pong" && frame.t === t) return frames;
      frames.push(frame);
    }
  }

  /** Closes the socket as a leaving page does. */
  close(): Promise<{ code: number; reason: string }> {
    this.#socket.close();
    return this.closed;
  }

  /** Goes without a close frame. */
  terminate(): void {
    this.#socket.terminate();
  }

  /** Creates a room. @returns its code */
  async create(maxClients = 8, clientId = "host", options: object = {}): Promise<string> {
    const created = await this.ask({ type: "create", clientId, maxClients, ...options });
    if (created.type !== "created") throw new Error(JSON.stringify(created));
    return created.room as string;
  }

  /** Joins a room. @returns the answer, `joined` or `error` */
  join(room: string, clientId: string): Promise<Frame> {
    return this.ask({ type: "join", clientId, room });
  }
}
