/** A plot of a few curves, as SVG. */

/** A named line through points. */
export type Curve = { name: string; points: [x: number, y: number][] };

/** A plot as SVG: x logarithmic, a label at each value; y from 0, or logarithmic if the highest is over ten times the lowest. */
export function plotSvg(title: string, subtitle: string, xLabel: string, yLabel: string, curves: Curve[]): string {
  const [width, height] = [760, 440];
  const [left, right, top, bottom] = [70, 736, 76, 384]; // the axes' box
  const inset = 30; // from the box to the first and the last value
  const colors = ["#0b62a4", "#c2410c"];
  const points = curves.flatMap((curve) => curve.points);
  const xs = [...new Set(points.map(([x]) => x))].sort((a, b) => a - b);
  const ys = points.map(([, y]) => y);
  const { ticks, part } = scale(Math.min(...ys), Math.max(...ys));
  const [first, last] = [Math.log(xs[0] ?? 1), Math.log(xs.at(-1) ?? 1)];
  const x = (value: number) => left + inset + ((Math.log(value) - first) / (last - first || 1)) * (right - left - 2 * inset);
  const y = (value: number) => bottom - part(value) * (bottom - top);

  const escape = (text: string) => text.replace(/[&<>]/g, (sign) => `&#${sign.charCodeAt(0)};`);
  const text = (x: number, y: number, content: string, style: string) =>
    `<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" ${style}>${escape(content)}</text>`;
  const line = (x1: number, y1: number, x2: number, y2: number, of: string) =>
    `<line x1="${x1.toFixed(1)}" y1="${y1.toFixed(1)}" x2="${x2.toFixed(1)}" y2="${y2.toFixed(1)}" stroke="${of}"/>`;
  const middle = 'text-anchor="middle"';

  const parts = [
    text(left, 24, title, 'font-size="16" font-weight="bold"'),
    text(left, 42, subtitle, 'font-size="11" fill="#555"'),
  ];
  for (const tick of ticks)
    parts.push(
      line(left, y(tick), right, y(tick), "#ddd"),
      text(left - 8, y(tick) + 4, String(Number(tick.toPrecision(3))), 'text-anchor="end"'),
    );
  for (const value of xs)
    parts.push(
      line(x(value), bottom, x(value), bottom + 5, "#333"),
      text(x(value), bottom + 20, value.toLocaleString("en-US"), middle),
    );
  const turn = `transform="translate(18 ${(top + bottom) / 2}) rotate(-90)"`;
  parts.push(
    line(left, top, left, bottom, "#333"),
    line(left, bottom, right, bottom, "#333"),
    text((left + right) / 2, height - 12, xLabel, middle),
    text(0, 0, yLabel, `${middle} ${turn}`),
  );
  for (const [i, { name, points }] of curves.entries()) {
    const fill = `fill="${colors[i % colors.length]}"`;
    const path = points.map(([px, py]) => `${x(px).toFixed(1)},${y(py).toFixed(1)}`).join(" ");
    parts.push(
      `<polyline points="${path}" fill="none" stroke="${colors[i % colors.length]}" stroke-width="2"/>`,
      text(left + i * 330, 62, `● ${name}`, `${fill} font-weight="bold"`),
    );
    for (const [px, py] of points) {
      // Of two curves the lower one is labelled below, of equal ones the second.
      const lower = curves.some((other, j) => other.points.some(([ox, oy]) => ox === px && (oy > py || (oy === py && j < i))));
      parts.push(
        `<circle cx="${x(px).toFixed(1)}" cy="${y(py).toFixed(1)}" r="3.5" ${fill}/>`,
        text(x(px), y(py) + (lower ? 18 : -9), String(Number(py.toPrecision(3))), `${middle} font-size="11" ${fill}`),
      );
    }
  }
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" font-family="sans-serif" font-size="12" fill="#222">
<rect width="${width}" height="${height}" fill="#fff"/>
${parts.join("\n")}
</svg>
`;
}

/** An axis for values from `lowest` to `highest`: round ticks, and where on it a value is, from 0 to 1. */
function scale(lowest: number, highest: number): { ticks: number[]; part: (value: number) => number } {
  const ticks: number[] = [];
  if (lowest > 0 && highest > 10 * lowest) {
    let exponent = Math.floor(Math.log10(lowest));
    do {
      for (const step of [1, 2, 5]) ticks.push(step * 10 ** exponent);
      exponent++;
    } while ((ticks.at(-1) as number) < highest);
    // The ticks around the values, and no more.
    while ((ticks[1] ?? Infinity) <= lowest) ticks.shift();
    while ((ticks.at(-2) ?? 0) >= highest) ticks.pop();
    const from = Math.log(ticks[0] as number);
    const to = Math.log(ticks.at(-1) as number);
    const inset = 0.06; // room for a label below the lowest
    return { ticks, part: (value) => inset + ((1 - inset) * (Math.log(value) - from)) / (to - from) };
  }
  const rough = (highest * 1.1) / 5;
  const magnitude = 10 ** Math.floor(Math.log10(rough));
  const step = magnitude * ([1, 2, 5, 10].find((each) => each * magnitude >= rough) ?? 10);
  const end = Math.ceil((highest * 1.1) / step) * step;
  for (let tick = 0; tick <= end + step / 2; tick += step) ticks.push(tick);
  return { ticks, part: (value) => value / end };
}
