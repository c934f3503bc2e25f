/** Counts of whole µs in buckets at most 1/32 wide (relative to their values): cheap to record, any percentile later. */
export class Histogram {
  readonly #counts = new Uint32Array(832); // up to 2^30 µs
  #total = 0;
  #most = 0;

  /** What all of them counted. */
  static sum(histograms: Histogram[]): Histogram {
    const sum = new Histogram();
    for (const each of histograms) {
      for (const [bucket, count] of each.#counts.entries()) (sum.#counts[bucket] as number) += count;
      sum.#total += each.#total;
      sum.#most = Math.max(sum.#most, each.#most);
    }
    return sum;
  }

  record(micros: number): void {
    this.#total++;
    if (micros > this.#most) this.#most = micros;
    const shift = micros < 64 ? 0 : 26 - Math.clz32(micros);
    (this.#counts[shift * 32 + (micros >>> shift)] as number)++;
  }

  /** The highest value in ms; 0 without records. */
  get mostMs(): number {
    return this.#most / 1000;
  }

  /** The value in ms below which `percent` of the records lie; 0 without records. */
  percentileMs(percent: number): number {
    let left = Math.ceil((this.#total * percent) / 100);
    for (const [bucket, count] of this.#counts.entries()) {
      left -= count;
      if (left <= 0 && count > 0) return Math.min(middleOf(bucket), this.#most) / 1000;
    }
    return 0;
  }

  /** `[upper end in ms, count]` in steps of 1, 2, 5, from the first to the last that isn't empty. */
  rows(): [number, number][] {
    const rows: [number, number][] = [];
    let bucket = 0;
    for (let end = 0.05, step = 0; bucket < this.#counts.length; step++) {
      let count = 0;
      while (bucket < this.#counts.length && middleOf(bucket) < end * 1000) count += this.#counts[bucket++] as number;
      if (count > 0 || rows.length > 0) rows.push([end, count]);
      end *= step % 3 === 2 ? 2.5 : 2; // 0.05, 0.1, 0.2, 0.5, 1, …
      end = Number(end.toPrecision(1));
    }
    while (rows.at(-1)?.[1] === 0) rows.pop();
    return rows;
  }
}

/** The middle of a bucket, in µs. */
function middleOf(bucket: number): number {
  const shift = bucket < 64 ? 0 : (bucket >> 5) - 1;
  return (bucket - shift * 32 + 0.5) * 2 ** shift - (shift ? 0 : 0.5);
}
