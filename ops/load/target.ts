/** The server under load: a process that is started, or one that runs already; what it uses; and what competes with it. */
import { readdirSync, readFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import { Child, freePort } from "../shared/processes.ts";
import { nginx, peersEnv, type Proxy, startClusterNginx } from "../shared/proxies.ts";
import { CpuGroup, type Throttling } from "./cpu-group.ts";
import type { Scenario, Target } from "./options.ts";

/** The limits that would be measured instead of the relay's work; 0 is unlimited. */
const NO_LIMITS = {
  MAX_MESSAGES_PER_SECOND: "0",
  MAX_CONNECTIONS: "0",
  MAX_ROOMS: "0",
  MAX_MISSES_PER_MINUTE: "0",
  MAX_CLIENTS_PER_ROOM: "0",
};

export const SERVER_CORE = 0;
export const TOOL_CORE = 1;
const canPin = availableParallelism() > 1 && Bun.which("taskset") !== null;
const pin = (command: string[], core = SERVER_CORE) => (canPin ? ["taskset", "-c", String(core), ...command] : command);

/** The cores that are not the tool's. */
const OTHER_CORES = Array.from({ length: availableParallelism() }, (_, core) => core).filter((core) => core !== TOOL_CORE);

/** Which core each of so many relays gets, and nginx before them: the tool's and the first one's if there are no more. */
export function coresOf(relays: number): { relays: number[]; nginx: number } {
  const each = Array.from({ length: relays }, (_, i) => OTHER_CORES[i] ?? TOOL_CORE);
  return { relays: each, nginx: OTHER_CORES[relays] ?? SERVER_CORE };
}

/** Whether server and tool get a core each: a relay that ran before is left where it is. */
export const pinned = (targets: Target[]) => canPin && targets.every((target) => target.command !== undefined);

/** Puts this process on its core, if the servers get another. */
export function pinTool(targets: Target[]): void {
  if (pinned(targets)) Bun.spawnSync(["taskset", "-acp", String(TOOL_CORE), String(process.pid)]);
}

function readProc(process: string, file: string): string | undefined {
  try {
    return readFileSync(`/proc/${process}/${file}`, "utf8");
  } catch {
    return undefined;
  }
}

/** What the kernel's scheduler counts of a thread, in µs: its time on a core, and its time spent waiting for one. */
function schedstat(process: string): { ran: number; waited: number } | undefined {
  const [ran, waited] = (readProc(process, "schedstat") ?? "").split(" ");
  return waited === undefined ? undefined : { ran: Number(ran) / 1000, waited: Number(waited) / 1000 };
}

const localUrl = (port: number) => new URL(`ws://127.0.0.1:${port}/`);

/** How long this process was ready to run and had no core, in µs since it began; 0 if unknown. */
export const toolWaitedMicros = () => schedstat("self")?.waited ?? 0;

/** What the kernel says of a process; each is undefined if it has ended or this isn't Linux. */
class Meter {
  /** CPU that each of its threads has used, those too that have ended since. */
  readonly #threads = new Map<string, number>();

  constructor(readonly pid: number) {}

  cpuMicros(): number | undefined {
    const tasks = `/proc/${this.pid}/task`;
    try {
      for (const thread of readdirSync(tasks)) {
        const micros = schedstat(`${this.pid}/task/${thread}`)?.ran;
        if (micros !== undefined) this.#threads.set(thread, micros);
      }
    } catch {
      return undefined;
    }
    return this.#threads.size === 0 ? undefined : this.#threads.values().reduce((sum, micros) => sum + micros, 0);
  }

  residentBytes(): number | undefined {
    const kibibytes = /^VmRSS:\s*(\d+)/m.exec(readProc(String(this.pid), "status") ?? "")?.[1];
    return kibibytes === undefined ? undefined : Number(kibibytes) * 1024;
  }
}

/** The sum; undefined if there is nothing to add, or one isn't known. */
function sum(values: (number | undefined)[]): number | undefined {
  return values.reduce(
    (all, value, i) => (i === 0 ? value : all === undefined || value === undefined ? undefined : all + value),
    undefined,
  );
}

/** The processes that a process has started. */
const childrenOf = (pid: number) => (readProc(`${pid}/task/${pid}`, "children") ?? "").split(" ").filter(Boolean).map(Number);

export class Server {
  readonly url: URL;
  /** Whether a member has to put its room's code into the path: a cluster sends it to the right relay by that. */
  readonly wantsCode: boolean;
  readonly #relays: Meter[];
  readonly #proxy: Meter[];
  readonly #group: CpuGroup | undefined;
  readonly #end: (() => Promise<unknown>) | undefined;

  /** @param end ends what was started */
  private constructor(url: URL, relays: number[], proxy: number[] = [], group?: CpuGroup, end?: () => Promise<unknown>) {
    this.url = url;
    this.wantsCode = relays.length > 1;
    this.#relays = relays.map((pid) => new Meter(pid));
    this.#proxy = proxy.map((pid) => new Meter(pid));
    this.#group = group;
    this.#end = end;
  }

  /** Starts the target's command and waits for the line with its port; a target with a URL is taken as it is. */
  static async start({ url, command = "", pid, behindNginx }: Target, { cpu }: Scenario): Promise<Server> {
    if (url !== undefined) return new Server(new URL(url), pid === undefined ? [] : [pid]);
    if (behindNginx !== undefined) return Server.#startBehindNginx(command, behindNginx);
    const group = cpu && new CpuGroup(cpu.quota);
    try {
      if (cpu?.spans === undefined) group?.limit();
      // The shell enters the group and becomes the server, so that the quota holds from the server's first instruction.
      const enter = group ? `echo $$ > "${group.members}" && ` : "";
      const env = { ...process.env, ...NO_LIMITS, PORT: "0" };
      const child = new Child(pin(["sh", "-c", `${enter}exec ${command}`]), { env, cwd: process.cwd() });
      try {
        return new Server(localUrl(await child.saysPort()), [child.pid], [], group, () => child.stop());
      } catch (error) {
        await child.stop("SIGKILL");
        throw error;
      }
    } catch (error) {
      group?.remove();
      throw error;
    }
  }

  /** Starts so many relays and nginx before them, each relay on a core of its own as far as there are any. */
  static async #startBehindNginx(command: string, count: number): Promise<Server> {
    if (nginx.whyNot !== "") throw new Error("there is no nginx on this machine");
    await using stack = new AsyncDisposableStack();
    const cores = coresOf(count);
    const ports = Array.from({ length: count }, () => `${freePort()}`);
    const relays = ports.map((port, i) => {
      const cluster = count > 1 && { ...peersEnv(ports), INSTANCE_ID: port };
      const env = { ...process.env, ...NO_LIMITS, ADDRESS_HEADER: "X-Forwarded-For", PORT: port, ...cluster };
      const relay = new Child(pin(["sh", "-c", `exec ${command}`], cores.relays[i]), { env, cwd: process.cwd() });
      stack.defer(async () => void (await relay.stop()));
      return relay;
    });
    await Promise.all(relays.map((relay) => relay.saysPort()));
    const edits = { "events {}": "events { worker_connections 65536; }" }; // a member takes two
    const inside = pin([], cores.nginx);
    const proxy: Proxy = await (count > 1
      ? startClusterNginx(ports, edits, inside)
      : nginx.start(Number(ports[0]), edits, inside));
    stack.use(proxy);
    const pids = relays.map(({ pid }) => pid);
    const workers = childrenOf(proxy.process.pid);
    const running = stack.move();
    return new Server(localUrl(Number(new URL(proxy.url).port)), pids, workers, undefined, () => running.disposeAsync());
  }

  /** CPU that the relays have used, in µs; only differences count. Undefined if they aren't local or this isn't Linux. */
  cpuMicros(): number | undefined {
    return sum(this.#relays.map((meter) => meter.cpuMicros()));
  }

  /** The same of all of nginx's worker processes; undefined if there is no nginx, too. */
  proxyCpuMicros(): number | undefined {
    return sum(this.#proxy.map((meter) => meter.cpuMicros()));
  }

  /** Resident memory of the relays in bytes; undefined as above. */
  residentBytes(): number | undefined {
    return sum(this.#relays.map((meter) => meter.residentBytes()));
  }

  /** How long the relays were ready to run and had no core, in µs since they began; undefined as above. */
  waitedMicros(): number | undefined {
    return sum(this.#relays.map(({ pid }) => schedstat(String(pid))?.waited));
  }

  /** How often its quota stopped it, since it began; undefined if it has none. */
  throttling(): Throttling | undefined {
    return this.#group?.throttling();
  }

  /** Puts its quota in force. */
  limit(): void {
    this.#group?.limit();
  }

  /** Takes its quota off. */
  lift(): void {
    this.#group?.lift();
  }

  /** Ends a child, by force after 5 s; a relay that ran before stays. */
  async stop(): Promise<void> {
    this.lift();
    await this.#end?.();
    this.#group?.remove();
  }
}

/** A process that does nothing, as fast as it can, on the server's core. */
export class Rival {
  #child: Child | undefined;

  start(): void {
    this.#child = new Child(pin(["sh", "-c", "while :; do :; done"]));
  }

  async stop(): Promise<void> {
    await this.#child?.stop("SIGKILL");
    this.#child = undefined;
  }
}
