// The step records that the page holds, live or from a file, and who sat in which slot at each of them.
// Must not know the page.

export const KEPT = 10000;
const SCHEMA = 1; // of the records, as GET /steps says it
const MAX_REQUESTS = 20000;
const KINDS = "dprxw.";

export class Recording {
  constructor(slots, limits = {}) {
    this.slots = slots;
    this.limits = limits;
    this.steps = []; // {record, owners: serial number by slot, stretch}
    this.requests = new Map(); // by serial number: {cls, id}
    this.owners = new Int32Array(slots);
  }

  get length() {
    return this.steps.length;
  }

  get first() {
    return this.steps.length ? this.steps[0].record.id : 0;
  }

  get last() {
    return this.steps.length ? this.steps[this.steps.length - 1].record.id : 0;
  }

  // The place of a step, or of the nearest one that is held.
  indexOf(id) {
    return Math.max(0, Math.min(this.steps.length - 1, id - this.first));
  }

  // Takes records in order of their ids. A smaller id means that the server was started anew: what was held is dropped.
  add(records) {
    for (const record of records) {
      if (record.id <= this.last) {
        if (this.steps[this.indexOf(record.id)].record.end === record.end) continue;
        this.steps = [];
        this.owners = new Int32Array(this.slots);
        this.requests.clear();
      }
      for (const [slot] of record.gone) this.owners[slot] = 0;
      for (const [slot, serial, cls, id] of record.new) {
        this.owners[slot] = serial;
        this.requests.set(serial, { cls, id });
      }
      this.steps.push({ record, owners: this.owners.slice(), stretch: grown(this.steps[this.steps.length - 1], record) });
    }
    if (this.steps.length > KEPT) this.steps.splice(0, this.steps.length - KEPT);
    for (const serial of this.requests.keys()) {
      if (this.requests.size <= MAX_REQUESTS) break;
      this.requests.delete(serial);
    }
  }

  toJSON() {
    return { schema: SCHEMA, slots: this.slots, limits: this.limits, steps: this.steps.map((step) => step.record) };
  }

  // A recording out of what toJSON gave, or GET /steps. Throws an Error that names what will not do.
  static from(value) {
    if (value?.schema !== SCHEMA) {
      const found = value?.schema === undefined ? "there is none" : `it is ${value.schema}`;
      throw new Error(`schema: must be ${SCHEMA}, the version that this page reads; ${found}`);
    }
    const slots = value.slots;
    if (!Number.isInteger(slots) || slots < 1 || slots > 4096) throw new Error("slots: must be a whole number from 1 to 4096");
    if (!Array.isArray(value.steps) || !value.steps.length) throw new Error("steps: must be a list of at least one record");
    value.steps.forEach((record, i) => check(record, slots, i));
    const recording = new Recording(slots, value.limits ?? {});
    recording.add(value.steps.slice(-KEPT));
    return recording;
  }
}

// The stretch of steps that ends with `record`, in one mode and since one reset of the statistics: its first step that is
// known, whether there may have been one before, and the padding share (docs/glossary.md).
function grown(before, record) {
  const last = before?.record;
  const same = last && last.mode === record.mode && last.first_step === record.first_step;
  const { first, cut, padding, computed } = same
    ? before.stretch
    : { first: record.id, cut: !last && record.id > (record.first_step ?? 1), padding: 0, computed: 0 };
  const stretch = { first, cut, padding: padding + record.padding, computed: computed + record.computed };
  return { ...stretch, share: stretch.padding ? stretch.padding / (stretch.padding + stretch.computed) : 0 };
}

function check(record, slots, i) {
  const fail = (field, told) => {
    throw new Error(`steps[${i}].${field}: ${told}`);
  };
  if (typeof record !== "object" || record === null) throw new Error(`steps[${i}]: must be an object`);
  for (const field of ["id", "end", "ms", "queue", "running", "kv", "computed", "tokens", "padding"]) {
    if (!Number.isFinite(record[field])) fail(field, "must be a number");
  }
  if (typeof record.mode !== "string") fail("mode", "must be a text");
  const cells = record.cells;
  if (typeof cells !== "string" || cells.length > slots || [...cells].some((cell) => !KINDS.includes(cell))) {
    fail("cells", `must be at most ${slots} of the characters ${KINDS}`);
  }
  for (const [field, length] of [["new", 4], ["gone", 2], ["why", 2]]) {
    const rows = record[field];
    if (!Array.isArray(rows) || !rows.every((row) => Array.isArray(row) && row.length >= length)) {
      fail(field, `must be a list of lists of ${length}`);
    }
    if (field !== "why" && rows.some(([slot]) => !(Number.isInteger(slot) && slot >= 0 && slot < slots))) {
      fail(field, `slots go from 0 to ${slots - 1}`);
    }
  }
}
