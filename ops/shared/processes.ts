/** Child processes: started with an environment of their own, read a line at a time, and ended with the tool that started them. */
import { resolve } from "node:path";
import { PATIENCE_MS, within } from "./wait.ts";

/** The directory of `server.ts`. */
export const ROOT = resolve(import.meta.dir, "../..");

const START_MS = 20_000; // twenty may start at once on two cores
const STOP_MS = 5_000; // then by force

export type ChildOptions = {
  /** Variables beside PATH and HOME; nothing else is handed on unless it is here. */
  env?: Record<string, string | undefined>;
  /** Where it runs; `ROOT` if absent. */
  cwd?: string;
  /** What it gets if this process ends first; SIGKILL if absent, of which its own children don't hear. */
  endWith?: NodeJS.Signals;
  /** Takes each line as it is printed. */
  onLine?(line: string): void;
};

const running = new Map<Bun.Subprocess, NodeJS.Signals>();
process.on("exit", () => running.forEach((signal, child) => child.kill(signal)));

function spawn(command: string[], { env = {}, cwd = ROOT, endWith = "SIGKILL" }: ChildOptions) {
  const { PATH, HOME } = process.env;
  const child = Bun.spawn(command, { cwd, env: { PATH, HOME, ...env }, stdio: ["pipe", "pipe", "pipe"] });
  running.set(child, endWith);
  void child.exited.then(() => running.delete(child));
  return child;
}

/** A process that runs beside this one. */
export class Child implements AsyncDisposable {
  /** What it has printed, on its output and its error output, a line each. */
  readonly lines: string[] = [];
  /** Its exit code, once all that it printed is in `lines`; 128 and the signal's number if a signal ended it. */
  readonly exited: Promise<number>;
  readonly #process: ReturnType<typeof spawn>;
  #printed = Promise.withResolvers<void>();
  #isOver = false;

  /** Starts a command. @throws if there is no such program */
  constructor(
    readonly command: string[],
    options: ChildOptions = {},
  ) {
    this.#process = spawn(command, options);
    const streams = [this.#process.stdout, this.#process.stderr].map((stream) => this.#read(stream, options.onLine));
    this.exited = Promise.all(streams).then(() => {
      this.#isOver = true;
      this.#printed.resolve();
      return this.#process.exited;
    });
  }

  get pid(): number {
    return this.#process.pid;
  }

  /** Null while it runs. */
  get exitCode(): number | null {
    return this.#process.exitCode;
  }

  /** Waits for a line, one that is there already too. @throws if the process ends or `ms` pass without it */
  async line(pattern: RegExp, ms = START_MS): Promise<RegExpExecArray> {
    return this.#find(String(pattern), (line) => pattern.exec(line) ?? undefined, ms);
  }

  /** Waits for its line of that index, from 0. @throws as `line` does */
  async lineAt(index: number, ms = START_MS): Promise<string> {
    let seen = 0;
    return this.#find(`line ${index + 1}`, (line) => (seen++ === index ? line : undefined), ms);
  }

  /** Waits until it says the port that it listens on. @throws as `line` does */
  async saysPort(ms = START_MS): Promise<number> {
    return this.#find("its port", portIn, ms);
  }

  /** Types into its standard input. */
  type(text: string): void {
    this.#process.stdin.write(text);
    void this.#process.stdin.flush();
  }

  signal(name: NodeJS.Signals): void {
    this.#process.kill(name);
  }

  /** Sends a signal and waits for the end, which comes by SIGKILL after `ms`. @returns the exit code */
  async stop(name: NodeJS.Signals = "SIGTERM", ms = STOP_MS): Promise<number> {
    this.#process.kill(name);
    const force = setTimeout(() => this.#process.kill("SIGKILL"), ms);
    await this.#process.exited;
    clearTimeout(force);
    return this.exited;
  }

  /** Ends the process, whatever it does. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#process.kill("SIGKILL");
    await this.#process.exited;
  }

  async #find<T>(what: string, look: (line: string) => T | undefined, ms: number): Promise<T> {
    const search = async (): Promise<T> => {
      for (let i = 0; ; i++) {
        for (; i === this.lines.length; await this.#printed.promise)
          if (this.#isOver) throw new Error(`${this.command.join(" ")} ended before ${what}:\n${this.lines.join("\n")}`);
        const found = look(this.lines[i] as string);
        if (found !== undefined) return found;
      }
    };
    return within(search(), `${what} from ${this.command.join(" ")}`, ms);
  }

  async #read(stream: ReadableStream<Uint8Array>, onLine: ChildOptions["onLine"]): Promise<void> {
    const add = (lines: string[]) => {
      this.lines.push(...lines);
      if (onLine !== undefined) lines.forEach(onLine);
      this.#printed.resolve();
      this.#printed = Promise.withResolvers();
    };
    const decoder = new TextDecoder();
    let rest = "";
    for await (const bytes of stream) {
      const lines = (rest + decoder.decode(bytes, { stream: true })).split("\n");
      rest = lines.pop() as string;
      add(lines);
    }
    if (rest !== "") add([rest]);
  }
}

/** How a server may say its port, the clearest first. */
const PORT_PATTERNS = [/\bport"?[=: ]+(\d+)/i, /:\/\/[^\s/]*:(\d+)/, /:(\d{4,5})\b/];

function portIn(line: string): number | undefined {
  const port = PORT_PATTERNS.map((pattern) => pattern.exec(line)?.[1]).find(Boolean);
  return port === undefined ? undefined : Number(port);
}

/** `server.ts` as a process of its own. */
export class RelayProcess extends Child {
  /** Where it listens; 0 until then. */
  port = 0;

  get url(): string {
    return `http://127.0.0.1:${this.port}`;
  }

  /**
   * Starts it on a free port, unless `env` has a PORT, and waits until it listens. @param server another server.ts than ours
   * @throws if it ends before
   */
  static async start(env: ChildOptions["env"] = {}, server = `${ROOT}/server.ts`): Promise<RelayProcess> {
    const idle = { IDLE_EXIT_SECONDS: "60" }; // it outlives a parent that is killed by so long
    const relay = new RelayProcess([process.execPath, "run", server], { env: { PORT: "0", ...idle, ...env } });
    try {
      relay.port = await relay.saysPort();
    } catch (error) {
      await relay[Symbol.asyncDispose]();
      throw error;
    }
    return relay;
  }
}

/** Runs a command to its end, with nothing to read. @throws if it takes longer than `ms` */
export async function run(command: string[], options: ChildOptions = {}, ms = 6 * PATIENCE_MS) {
  const child = spawn(command, options);
  child.stdin.end();
  const [stdout, stderr] = [new Response(child.stdout).text(), new Response(child.stderr).text()];
  try {
    const exitCode = await within(child.exited, `the end of ${command.join(" ")}`, ms);
    return { exitCode, stdout: await stdout, stderr: await stderr };
  } finally {
    child.kill("SIGKILL");
  }
}

/** A port that is free now, for servers that take no port 0. */
export function freePort(): number {
  using server = Bun.serve({ port: 0, hostname: "127.0.0.1", fetch: () => new Response() });
  return server.port as number;
}
