/** The server under load: a process that is started, or one that runs already; what it uses; and what competes with it. */
import { readdirSync, readFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import { Child } from "../shared/processes.ts";
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
const pin = (command: string[]) => (canPin ? ["taskset", "-c", String(SERVER_CORE), ...command] : command);

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

/** How long this process was ready to run and had no core, in µs since it began; 0 if unknown. */
export const toolWaitedMicros = () => schedstat("self")?.waited ?? 0;

export class Server {
  readonly url: URL;
  readonly #pid: number | undefined;
  readonly #child: Child | undefined;
  readonly #group: CpuGroup | undefined;
  /** CPU that each of its threads has used, those too that have ended since. */
  readonly #threads = new Map<string, number>();

  private constructor(url: URL, pid: number | undefined, child?: Child, group?: CpuGroup) {
    this.url = url;
    this.#pid = pid;
    this.#child = child;
    this.#group = group;
  }

  /** Starts the target's command and waits for the line with its port; a target with a URL is taken as it is. */
  static async start({ url, command, pid }: Target, { cpu }: Scenario): Promise<Server> {
    if (url !== undefined) return new Server(new URL(url), pid);
    const group = cpu && new CpuGroup(cpu.quota);
    try {
      if (cpu?.spans === undefined) group?.limit();
      // The shell enters the group and becomes the server, so that the quota holds from the server's first instruction.
      const enter = group ? `echo $$ > "${group.members}" && ` : "";
      const env = { ...process.env, ...NO_LIMITS, PORT: "0" };
      const child = new Child(pin(["sh", "-c", `${enter}exec ${command}`]), { env, cwd: process.cwd() });
      try {
        return new Server(new URL(`ws://127.0.0.1:${await child.saysPort()}/`), child.pid, child, group);
      } catch (error) {
        await child.stop("SIGKILL");
        throw error;
      }
    } catch (error) {
      group?.remove();
      throw error;
    }
  }

  /** CPU that the process has used, in µs; only differences count. Undefined if it isn't local or this isn't Linux. */
  cpuMicros(): number | undefined {
    if (this.#pid === undefined) return undefined;
    const tasks = `/proc/${this.#pid}/task`;
    try {
      for (const thread of readdirSync(tasks)) {
        const micros = schedstat(`${this.#pid}/task/${thread}`)?.ran;
        if (micros !== undefined) this.#threads.set(thread, micros);
      }
    } catch {
      return undefined;
    }
    return this.#threads.size === 0 ? undefined : this.#threads.values().reduce((sum, micros) => sum + micros, 0);
  }

  /** Resident memory in bytes; undefined as above. */
  residentBytes(): number | undefined {
    if (this.#pid === undefined) return undefined;
    const kibibytes = /^VmRSS:\s*(\d+)/m.exec(readProc(String(this.#pid), "status") ?? "")?.[1];
    return kibibytes === undefined ? undefined : Number(kibibytes) * 1024;
  }

  /** How long the process was ready to run and had no core, in µs since it began; 0 if unknown. */
  waitedMicros(): number {
    return this.#pid === undefined ? 0 : (schedstat(String(this.#pid))?.waited ?? 0);
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
    await this.#child?.stop();
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
