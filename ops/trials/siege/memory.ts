/** A bound on a process's memory, as a container has it: a memory cgroup, version 1 or 2. */
import { existsSync, mkdirSync, readFileSync, rmdirSync, writeFileSync } from "node:fs";

const V1 = "/sys/fs/cgroup/memory";
const V2 = "/sys/fs/cgroup";

export type MemoryGroup = Disposable & {
  /** What stands before a command, so that it runs inside. */
  readonly prefix: string[];
};

/** Makes a group. @throws an error that says in words what is missing here */
export function memoryGroup(bytes: number): MemoryGroup {
  const isV1 = existsSync(V1);
  const path = `${isV1 ? V1 : V2}/party-sockets-siege-${process.pid}`;
  try {
    if (!isV1) letChildrenCount();
    mkdirSync(path);
    writeFileSync(`${path}/${isV1 ? "memory.limit_in_bytes" : "memory.max"}`, String(bytes));
    if (!isV1 && existsSync(`${path}/memory.swap.max`)) writeFileSync(`${path}/memory.swap.max`, "0");
  } catch (error) {
    if (existsSync(path)) rmdirSync(path);
    const why = process.getuid?.() === 0 ? (error as Error).message : "that needs root";
    throw new Error(`no memory cgroup can be made under ${isV1 ? V1 : V2}: ${why}`);
  }
  return {
    prefix: ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', path],
    [Symbol.dispose]() {
      try {
        rmdirSync(path);
      } catch {
        // a process in it is about to end; an empty group costs nothing
      }
    },
  };
}

/** In version 2 a group counts memory only if the one above it says so. */
function letChildrenCount(): void {
  const control = `${V2}/cgroup.subtree_control`;
  if (!existsSync(control)) throw new Error("cgroups aren't mounted");
  if (!readFileSync(control, "utf8").split(/\s/).includes("memory")) writeFileSync(control, "+memory");
}

/** What a process occupies now, and at most so far, in bytes; undefined if it has ended, or the system doesn't say. */
export function memoryOf(pid: number): { now: number; peak: number } | undefined {
  try {
    const status = readFileSync(`/proc/${pid}/status`, "utf8");
    const kib = (name: string): number => Number(new RegExp(`^${name}:\\s+(\\d+) kB$`, "m").exec(status)?.[1]);
    const [now, peak] = [kib("VmRSS") * 1024, kib("VmHWM") * 1024];
    return now > 0 ? { now, peak } : undefined;
  } catch {
    return undefined;
  }
}
