/** Podman and buildah for tests, on any machine that has them, one that is a container itself and runs no systemd too. */
import { existsSync } from "node:fs";
import { chmod, mkdir, symlink } from "node:fs/promises";
import { join } from "node:path";
import { packageManager } from "../../package.json" with { type: "json" };
import { temporaryDirectory } from "../shared/directory.ts";
import { Child, run } from "../shared/processes.ts";
import { until } from "../shared/wait.ts";

const PROGRAMS = ["buildah", "podman", "runc"]; // Debian's packages have the same names
const PATH = `${process.env.PATH}:/usr/sbin:/sbin`; // runc is in /usr/sbin

/** All that a relay needs: half a CPU, 256 MB, no right, no file to write, a user that no image knows. */
export const TIGHT = [
  ...["--memory=256m", "--cpus=0.5", "--user=4242:4242", "--cap-drop=all", "--security-opt=no-new-privileges"],
  ...["--read-only", "--read-only-tmpfs=false"],
];

/** A command ended with another exit code than 0. */
export class Failed extends Error {
  constructor(
    command: string[],
    readonly exitCode: number,
    stderr: string,
  ) {
    super(`${command.join(" ")} ended with ${exitCode}: ${stderr.trim()}`);
  }
}

/** The network of this machine, and no higher ulimits than a nested machine can give: podman would ask for a million files. */
const CONTAINERS_CONF = `
[containers]
netns = "host"
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs" # not systemd, which isn't everywhere
events_logger = "none"
lock_type = "file" # the other kind is shared with every podman of the machine
`;

/** An engine of the test's own: images and containers go with it. */
export class Engine implements AsyncDisposable {
  /** The engine's own directory, for what the test puts beside the storage. */
  readonly home: string;
  readonly #env: Record<string, string>;
  readonly #started = new Set<Child>();
  #service: Child | undefined;

  private constructor(private readonly directory: { path: string } & AsyncDisposable) {
    const { path } = directory;
    this.home = path;
    const conf = { CONTAINERS_CONF: `${path}/containers.conf`, CONTAINERS_STORAGE_CONF: `${path}/storage.conf` };
    this.#env = { PATH, TMPDIR: path, ...conf };
  }

  /** An engine without an image or a container. */
  static async open(): Promise<Engine> {
    const directory = await temporaryDirectory("engine");
    const { path } = directory;
    await Bun.write(
      join(path, "containers.conf"),
      `${CONTAINERS_CONF}tmp_dir = "${path}/tmp"\n[network]\nnetwork_config_dir = "${path}/networks"\n`,
    );
    // vfs copies each layer, and needs nothing from the file system below
    const storage = ['driver = "vfs"', `graphroot = "${path}/storage"`, `runroot = "${path}/run"`];
    await Bun.write(join(path, "storage.conf"), ["[storage]", ...storage, ""].join("\n"));
    return new Engine(directory);
  }

  /** Runs a command. @returns what it printed @throws Failed */
  async run(...command: string[]): Promise<string> {
    const { exitCode, stdout, stderr } = await run(command, { env: this.#env, cwd: this.home });
    if (exitCode !== 0) throw new Failed(command, exitCode, stderr);
    return stdout.trim();
  }

  /** Builds an image in docker's format, which alone knows HEALTHCHECK; nothing is downloaded. */
  async build(name: string, context: string, ...options: string[]): Promise<void> {
    await this.run("buildah", "bud", "--format=docker", "--pull-never", `--tag=${name}`, ...options, context);
  }

  /**
   * Builds an image of programs of this machine, with the libraries that they load, in place of one that would be downloaded.
   * @param programs their paths in the image, and here
   * @param files texts by their paths in the image, scripts among them
   * @param dockerfile what follows `COPY . /`
   */
  async buildStandIn(name: string, programs: Record<string, string>, files: Record<string, string>, dockerfile: string) {
    const root = join(this.home, name.replace(/\W/g, "-"));
    const put = async (path: string, content: string | Bun.BunFile) => {
      await Bun.write(join(root, path), content);
      await chmod(join(root, path), 0o755);
    };
    for (const [path, from] of Object.entries(programs)) {
      await put(path, Bun.file(from));
      const libraries = (await this.run("ldd", from)).matchAll(/(?<=^\t|=> )\/\S+/gm);
      for (const [library] of libraries) await put(library, Bun.file(library));
    }
    for (const [path, text] of Object.entries(files)) await put(path, text);
    await Bun.write(`${root}.dockerfile`, `FROM scratch\nCOPY . /\n${dockerfile}`);
    await this.build(name, root, `--file=${root}.dockerfile`);
  }

  /** Builds the stand-in of the official base image under its name: its user, its variables, its entry point, and Bun. */
  buildBun(): Promise<void> {
    return this.buildStandIn(
      `docker.io/oven/${packageManager.replace("@", ":")}-slim`,
      { "usr/local/bin/bun": process.execPath, "bin/sh": "/bin/sh" },
      {
        "etc/passwd": "root:x:0:0::/root:/bin/sh\nbun:x:1000:1000::/home/bun:/bin/sh\n",
        "etc/group": "root:x:0:\nbun:x:1000:\n",
        "usr/local/bin/docker-entrypoint.sh": '#!/bin/sh\nset -e\nexec "$@"\n',
      },
      `ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
       ENV BUN_RUNTIME_TRANSPILER_CACHE_PATH=0
       WORKDIR /home/bun/app
       ENTRYPOINT ["/usr/local/bin/docker-entrypoint.sh"]
       CMD ["/usr/local/bin/bun"]`,
    );
  }

  /** Serves docker's API. @returns where, as DOCKER_HOST has it */
  async serve(): Promise<string> {
    const path = join(this.home, "podman.sock");
    this.#service = new Child(["podman", "system", "service", "--time=0", `unix://${path}`], { env: this.#env, cwd: this.home });
    await until("podman's service", () => existsSync(path));
    return `unix://${path}`;
  }

  /** Runs a command of podman. @returns what it printed @throws Failed */
  podman(...command: string[]): Promise<string> {
    return this.run("podman", ...command);
  }

  /**
   * Starts a container that is gone once its process has ended.
   * @param what options, the image, its command
   * @returns the process: its output, its exit code
   */
  start(name: string, ...what: string[]): Child {
    const child = new Child(["podman", "run", "--rm", `--name=${name}`, ...what], { env: this.#env, cwd: this.home });
    this.#started.add(child);
    return child;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await using _ = this.directory;
    await this.#service?.stop();
    await this.podman("rm", "--all", "--force", "--time=0");
    for (const child of this.#started) await child.exited;
  }
}

/** Makes a root directory of this machine's programs: `/usr` is to be mounted. @returns podman's options for it */
export async function rootOfPrograms(directory: string): Promise<string[]> {
  await mkdir(directory);
  for (const name of ["bin", "sbin", "lib", "lib64"]) await symlink(`usr/${name}`, join(directory, name));
  for (const name of ["dev", "etc", "opt", "proc", "run", "sys", "tmp", "usr", "var"]) await mkdir(join(directory, name));
  return ["--volume=/usr:/usr:ro", "--rootfs", directory];
}

async function findWhyNot(): Promise<string | undefined> {
  const missing = PROGRAMS.filter((name) => Bun.which(name, { PATH }) === null);
  if (missing.length > 0) return ` (skipped: without ${missing.join(", ")}, Debian packages of these names)`;
  if (process.getuid?.() !== 0) return " (skipped: not root)";
  try {
    await using engine = await Engine.open();
    await engine.podman("run", "--rm", ...TIGHT, ...(await rootOfPrograms(join(engine.home, "root"))), "true");
  } catch (error) {
    return ` (skipped: no container can be limited on this machine: ${(error as Error).message.split("\n").at(-1)})`;
  }
}

/** Why tests with containers skip; undefined if they can run. */
export const whyNoEngine = await findWhyNot();
