/** A CPU cgroup (version 1 or 2) in which a server gets only so much of a core, as on a small rented machine. */
import { existsSync, mkdirSync, readFileSync, rmdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";

/** Time on a CPU that a process may use in each period. */
export type Quota = { runMicros: number; periodMicros: number };

/** How often the kernel made a process wait for its next period. `seconds` is how long in all. */
export type Throttling = { periods: number; throttled: number; seconds: number };

/** Where groups are made, and which files they have. */
export type Hierarchy = { root: string; version: 1 | 2 };

const HOW =
  "it needs root on Linux, and in a container a writable /sys/fs/cgroup (docker run --privileged). Or limit the server yourself, " +
  "for example with docker run --cpu-period=80000 --cpu-quota=5000, and give its address with --url";

const groups = new Set<CpuGroup>();
// The shared module that runs processes has killed them by then: it is imported, and so listens, before.
process.on("exit", () => groups.forEach((group) => group.remove()));

/** Where this machine has its CPU cgroups; undefined if it has none. */
export function cpuHierarchy(mounts = readFileSync("/proc/self/mounts", "utf8")): Hierarchy | undefined {
  for (const line of mounts.split("\n")) {
    const [, root = "", type, options = ""] = line.split(" ");
    if (type === "cgroup" && options.split(",").includes("cpu")) return { root, version: 1 };
    if (type === "cgroup2" && controllers(join(root, "cgroup.controllers")).includes("cpu")) return { root, version: 2 };
  }
  return undefined;
}

const controllers = (path: string) => (existsSync(path) ? readFileSync(path, "utf8").trim().split(" ") : []);

/** Why no group can be made here; undefined if one can. */
export function whyNoCpuGroup(): string | undefined {
  try {
    new CpuGroup({ runMicros: 5000, periodMicros: 80_000 }).remove();
    return undefined;
  } catch (error) {
    return (error as Error).message;
  }
}

export class CpuGroup {
  readonly path: string;
  readonly #version: 1 | 2;

  /**
   * Makes a group that nobody is in; the quota isn't in force yet.
   * @throws with how to make it possible, if it isn't
   */
  constructor(
    readonly quota: Quota,
    hierarchy = process.platform === "linux" ? cpuHierarchy() : undefined,
  ) {
    if (hierarchy === undefined) throw new Error(`this machine has no CPU cgroups: ${HOW}`);
    const { root, version } = hierarchy;
    this.#version = version;
    this.path = join(root, `party-sockets-load-${process.pid}-${groups.size + 1}`);
    try {
      const handedDown = join(root, "cgroup.subtree_control");
      if (version === 2 && !controllers(handedDown).includes("cpu")) writeFileSync(handedDown, "+cpu");
      mkdirSync(this.path);
    } catch (error) {
      throw new Error(`no CPU cgroup can be made (${(error as Error).message}): ${HOW}`);
    }
    groups.add(this);
  }

  /** The file into which a process writes its id to be in the group, with all that it starts. */
  get members(): string {
    return join(this.path, "cgroup.procs");
  }

  /** Puts the quota in force. */
  limit(): void {
    const { runMicros, periodMicros } = this.quota;
    if (this.#version === 2) return this.#write("cpu.max", `${runMicros} ${periodMicros}`);
    this.#write("cpu.cfs_period_us", String(periodMicros));
    this.#write("cpu.cfs_quota_us", String(runMicros));
  }

  /** Takes the quota off. */
  lift(): void {
    if (this.#version === 2) this.#write("cpu.max", `max ${this.quota.periodMicros}`);
    else this.#write("cpu.cfs_quota_us", "-1");
  }

  /** What has happened since the group was made. */
  throttling(): Throttling {
    const stat = readFileSync(join(this.path, "cpu.stat"), "utf8");
    const value = (name: string) => Number(new RegExp(`^${name} (\\d+)$`, "m").exec(stat)?.[1] ?? 0);
    const seconds = this.#version === 2 ? value("throttled_usec") / 1e6 : value("throttled_time") / 1e9;
    return { periods: value("nr_periods"), throttled: value("nr_throttled"), seconds };
  }

  /** Ends what is still in the group, and the group. */
  remove(): void {
    if (!groups.delete(this)) return;
    for (let tries = 0; ; tries++)
      try {
        return rmdirSync(this.path);
      } catch (error) {
        if (tries === 100) throw error;
        if (existsSync(this.members))
          for (const pid of readFileSync(this.members, "utf8").split("\n")) if (pid !== "") kill(Number(pid));
        Bun.sleepSync(10); // a killed process is in its group until the kernel has cleared it away
      }
  }

  #write(file: string, text: string): void {
    writeFileSync(join(this.path, file), text);
  }
}

function kill(pid: number): void {
  try {
    process.kill(pid, "SIGKILL");
  } catch {
    // It is gone already.
  }
}
