//! What Lua sees: `snapshot`, `site`, `series`, `process` and `units`. Documented for rule authors in
//! `rules/README.md`; keep the two together.
//!
//! The objects are small handles into the [`Context`]. Their fields are computed on access, so a rule pays for what
//! it looks at and no more.

use std::rc::Rc;
use std::sync::Arc;

use mlua::{Function, Integer, Lua, MultiValue, Table, UserData, UserDataFields, UserDataMethods, Value};

use super::view::{Context, Ending, Range, SeriesView, SiteView, Stat, TIME_SLACK_S, View, survival};
use crate::history::Sample;
use crate::kernel::KernelSample;
use crate::labels::Labels;
use crate::output::text::clip_bytes;
use crate::snapshot::{LIFETIME_CLASSES, Mode, Site, SiteReach, Totals};
use crate::stats;
use crate::symbolize::Frame;
use crate::units;

/// The host function that symbolizes the site of a place, while rules run. Absent, frames stay as they are.
pub(super) struct Symbolize(pub(super) Function);

/// Error of every access to an object of an earlier snapshot.
fn stale() -> mlua::Error {
    mlua::Error::runtime("this object belongs to an earlier snapshot: rules must not keep sites, series or processes")
}

/// A count as Lua integer; what does not fit is the largest one.
fn integer(n: u64) -> Integer {
    Integer::try_from(n).unwrap_or(Integer::MAX)
}

/// A site of the snapshot.
#[derive(Clone)]
pub(super) struct SiteRef {
    context: Rc<Context>,
    epoch: u64,
    place: u32,
}

impl SiteRef {
    pub(super) fn new(context: &Rc<Context>, place: u32) -> Self {
        SiteRef { context: Rc::clone(context), epoch: context.epoch(), place }
    }

    /// Its place; `None` when the snapshot is over.
    pub(super) fn place(&self) -> Option<u32> {
        (self.epoch == self.context.epoch()).then_some(self.place)
    }

    fn with<R>(&self, look: impl FnOnce(&View, SiteView<'_>) -> R) -> mlua::Result<R> {
        self.context
            .with(self.epoch, |view| view.site(self.place).map(|site| look(view, site)))
            .flatten()
            .ok_or_else(stale)
    }
}

/// Adds integer fields computed from the site's newest sample.
macro_rules! count_fields {
    ($fields:ident, $($name:literal => |$site:ident| $value:expr),+ $(,)?) => {
        $($fields.add_field_method_get($name, |_, this: &SiteRef| this.with(|_, $site| integer($value)));)+
    };
}

impl UserData for SiteRef {
    fn add_fields<F: UserDataFields<Self>>(fields: &mut F) {
        count_fields!(fields,
            "outstanding_bytes" => |s| s.history.latest.totals.outstanding_bytes(),
            "outstanding_count" => |s| s.history.latest.totals.outstanding_count(),
            "allocated_bytes" => |s| s.history.latest.totals.allocated_bytes,
            "allocated_count" => |s| s.history.latest.totals.allocated_count,
            "freed_bytes" => |s| s.history.latest.totals.freed_bytes,
            "freed_count" => |s| s.history.latest.totals.freed_count,
            "losses" => |s| s.process().map_or(0, |p| p.sample.losses.total()),
        );
        fields.add_field_method_get("series", |_, this| {
            let end = this.with(|_, s| s.series.samples.len())? as u32;
            let owner = Owner::Site(this.place);
            Ok(SeriesRef { context: Rc::clone(&this.context), epoch: this.epoch, owner, range: (0, end) })
        });
        fields.add_field_method_get("age_s", |_, this| this.with(|v, s| s.history.oldest_age_s(v.time_s)));
        fields.add_field_method_get("first_seen_s", |_, this| {
            this.with(|v, s| s.series.samples.first().map_or(v.time_s, |s| s.time_s))
        });
        fields
            .add_field_method_get("last_allocation_s", |_, this| this.with(|_, s| s.history.latest.last_allocation_s));
        fields.add_field_method_get("outstanding_bytes_stderr", |_, this| {
            this.with(|_, s| s.history.latest.stderr.bytes)
        });
        fields.add_field_method_get("outstanding_count_stderr", |_, this| {
            this.with(|_, s| s.history.latest.stderr.count)
        });
        fields.add_field_method_get("now_s", |_, this| this.with(|v, _| v.time_s));
        fields.add_field_method_get("id", |_, this| this.with(|_, s| format!("{:016x}", s.site().id)));
        fields.add_field_method_get("probe_set", |lua, this| {
            let name = this.with(|_, s| Arc::clone(&s.site().probe_set))?;
            lua.create_string(name.as_bytes())
        });
        fields.add_field_method_get("func", |lua, this| {
            let name = this.with(|_, s| Arc::clone(&s.site().function))?;
            lua.create_string(name.as_bytes())
        });
        fields.add_field_method_get("mode", |_, this| {
            this.with(|_, s| mode(s.process().map_or(Mode::Exact, |p| p.sample.mode)))
        });
        fields.add_field_method_get("truncated", |_, this| {
            this.with(|_, s| s.site().truncated.as_ref().map(|why| why.to_string()))
        });
        fields.add_field_method_get("process", |_, this| {
            let instance = this.with(|_, s| s.site().key.instance)?;
            Ok(ProcessRef { context: Rc::clone(&this.context), epoch: this.epoch, instance })
        });
        fields.add_field_method_get("frames", |lua, this| {
            let site = this.with(|_, s| Arc::clone(s.site()))?;
            frames(lua, &site, this.place)
        });
        fields.add_field_method_get("cohorts", cohorts);
        fields.add_field_method_get("is_kernel", |_, this| this.with(|_, s| s.history.latest.kernel.is_some()));
        fields.add_field_method_get("kernel", |lua, this| {
            let kernel = this.with(|_, s| s.history.latest.kernel.clone().map(|k| (k, s.history.latest.totals)))?;
            kernel.map(|(kernel, totals)| kernel_table(lua, &kernel, &totals)).transpose()
        });
        fields.add_field_method_get("reachability", |lua, this| {
            let reach = this.with(|v, s| s.history.latest.reachability.clone().map(|r| (r, v.time_s)))?;
            reach.map(|(reach, now_s)| reachability(lua, &reach, now_s)).transpose()
        });
    }

    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("survival", |_, this, (min_age_s, max_age_s): (f64, Option<f64>)| {
            let s = this.with(|v, s| survival(s.history, v.time_s, min_age_s, max_age_s.unwrap_or(f64::INFINITY)))?;
            Ok((
                s.share(),
                integer(s.outstanding_count),
                integer(s.born_count),
                integer(s.outstanding_bytes),
                integer(s.cohorts),
                integer(s.cohorts_with_survivors),
            ))
        });
        methods.add_method("lifetime_s", |_, this, q: f64| {
            this.with(|_, s| stats::log2_quantile(&s.history.latest.lifetimes, 1e-6, q))
        });
        methods.add_method("lifetimes", |lua, this, ()| {
            let counts = this.with(|_, s| s.history.latest.lifetimes)?;
            let table = lua.create_table_with_capacity(LIFETIME_CLASSES, 0)?;
            for n in counts {
                table.raw_push(integer(n))?;
            }
            Ok(table)
        });
    }
}

fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Exact => "exact",
        Mode::Sampled => "sampled",
        Mode::Estimated => "estimated",
    }
}

/// Frames of a site as a list of tables; symbolizes it if nobody has yet.
fn frames(lua: &Lua, site: &Site, place: u32) -> mlua::Result<Table> {
    if site.frames.get().is_none() {
        // The function is taken out of the reference first: it may run for a while.
        let symbolize = lua.app_data_ref::<Symbolize>().map(|s| s.0.clone());
        if let Some(symbolize) = symbolize {
            symbolize.call::<()>(place)?;
        }
    }
    let list = lua.create_table_with_capacity(site.frames().len(), 0)?;
    for frame in site.frames() {
        list.raw_push(frame_table(lua, frame)?)?;
    }
    Ok(list)
}

fn frame_table(lua: &Lua, frame: &Frame) -> mlua::Result<Table> {
    let table = lua.create_table_with_capacity(0, 8)?;
    table.raw_set("func", frame.function.as_deref())?;
    table.raw_set("module", frame.module.as_deref())?;
    table.raw_set("offset", integer(frame.offset))?;
    table.raw_set("file", frame.file.as_deref())?;
    table.raw_set("line", frame.line)?;
    table.raw_set("inlined", frame.inlined)?;
    table.raw_set("reason", frame.reason.as_deref())?;
    table.raw_set("build_id", frame.build_id.as_deref())?;
    Ok(table)
}

fn cohorts(lua: &Lua, this: &SiteRef) -> mlua::Result<Table> {
    let (now_s, cohorts) = this.with(|v, s| (v.time_s, s.history.latest.cohorts.clone()))?;
    let list = lua.create_table_with_capacity(cohorts.len(), 0)?;
    for c in cohorts {
        let table = lua.create_table_with_capacity(0, 8)?;
        table.raw_set("start_s", c.start_s)?;
        table.raw_set("end_s", c.end_s)?;
        table.raw_set("age_s", (now_s - c.end_s).max(0.0))?;
        table.raw_set("born_bytes", integer(c.born_bytes))?;
        table.raw_set("born_count", integer(c.born_count))?;
        table.raw_set("outstanding_bytes", integer(c.outstanding_bytes))?;
        table.raw_set("outstanding_count", integer(c.outstanding_count))?;
        let share = if c.born_count == 0 { 0.0 } else { c.outstanding_count as f64 / c.born_count as f64 };
        table.raw_set("survival", share)?;
        list.raw_push(table)?;
    }
    Ok(list)
}

/// What is known of a site of the kernel.
fn kernel_table(lua: &Lua, kernel: &KernelSample, totals: &Totals) -> mlua::Result<Table> {
    let table = lua.create_table_with_capacity(0, 10)?;
    table.raw_set("cache", kernel.origin.cache.as_deref())?;
    table.raw_set("object_bytes", integer(kernel.origin.object_bytes))?;
    let slack = kernel.slack_bytes(totals.outstanding_count(), totals.outstanding_bytes());
    table.raw_set("slack_bytes", integer(slack))?;
    table.raw_set("gfp", kernel.origin.gfp.as_str())?;
    table.raw_set("comm", kernel.origin.first_comm.as_str())?;
    table.raw_set("unseen_frees", integer(kernel.unseen_frees))?;
    table.raw_set("unverifiable", kernel.unverifiable.as_deref())?;
    table.raw_set("reclaimable", kernel.reclaimable)?;
    table.raw_set("cache_growth_bytes", kernel.cache_growth_bytes)?;
    Ok(table)
}

/// Longest way to a block that rules see, bytes: it has a place in their reasons, which are bounded too.
const MAX_WAY: usize = 600;

/// What the last scans said of a site.
fn reachability(lua: &Lua, reach: &SiteReach, now_s: f64) -> mlua::Result<Table> {
    let table = lua.create_table_with_capacity(0, 16)?;
    let counts = &reach.counts;
    table.raw_set("verdict", reach.verdict.as_str())?;
    table.raw_set("lost_count", integer(counts.lost_blocks()))?;
    table.raw_set("lost_bytes", integer(counts.lost_bytes()))?;
    table.raw_set("indirectly_lost_count", integer(counts.indirectly_lost.blocks))?;
    table.raw_set("possible_count", integer(counts.possible.blocks))?;
    table.raw_set("reachable_count", integer(counts.reachable.blocks))?;
    table.raw_set("reachable_bytes", integer(counts.reachable.bytes))?;
    table.raw_set("unknown_count", integer(counts.disguised.blocks + counts.young.blocks + counts.gone.blocks))?;
    table.raw_set("called_lost", integer(counts.called_lost))?;
    table.raw_set("refuted", integer(counts.refuted))?;
    table.raw_set("scans", counts.scans)?;
    table.raw_set("age_s", (now_s - reach.time_s).max(0.0))?;
    if let Some((fraction, low, high)) = counts.lost_fraction() {
        table.raw_set("lost_fraction", fraction)?;
        table.raw_set("lost_low", low)?;
        table.raw_set("lost_high", high)?;
    }
    let way = reach.way.as_ref().map(|way| way.describe());
    table.raw_set("way", way.as_deref().map(|way| clip_bytes(way, MAX_WAY)))?;
    Ok(table)
}

/// Whose series it is.
#[derive(Clone, Copy)]
enum Owner {
    Site(u32),
    Totals,
}

/// Part of a series.
#[derive(Clone)]
pub(super) struct SeriesRef {
    context: Rc<Context>,
    epoch: u64,
    owner: Owner,
    range: Range,
}

impl SeriesRef {
    fn with<R>(&self, look: impl FnOnce(SeriesView<'_>) -> R) -> mlua::Result<R> {
        self.context
            .with(self.epoch, |view| match self.owner {
                Owner::Totals => Some(look(view.totals())),
                Owner::Site(place) => view.site(place).map(|s| look(s.series)),
            })
            .flatten()
            .ok_or_else(stale)
    }

    fn samples<R>(&self, look: impl FnOnce(&[Sample]) -> R) -> mlua::Result<R> {
        self.with(|series| look(series.range(self.range)))
    }

    /// Between the first and the last sample; 0 for fewer than two.
    fn change(&self, of: impl Fn(&Sample) -> f64) -> mlua::Result<f64> {
        self.samples(|samples| match samples {
            [first, .., last] => of(last) - of(first),
            _ => 0.0,
        })
    }

    fn part(&self, start: u32, end: u32) -> SeriesRef {
        SeriesRef { range: (start.min(end), end), ..self.clone() }
    }

    /// Index of the first sample of the window of the last `seconds`, at least `snapshots` long.
    fn window_start(&self, seconds: f64, snapshots: Option<u32>) -> mlua::Result<u32> {
        let by_time = self.samples(|samples| {
            let newest = samples.last().map_or(0.0, |s| s.time_s);
            samples.partition_point(|s| s.time_s < newest - seconds - TIME_SLACK_S) as u32
        })?;
        let by_number = self.range.1.saturating_sub(snapshots.unwrap_or(0)).max(self.range.0);
        Ok((self.range.0 + by_time).min(by_number))
    }
}

/// Bytes, blocks and time of a sample: what `first`, `last` and `at` return. Nothing when there is none.
fn sample_values(sample: Option<&Sample>) -> MultiValue {
    sample
        .map(|s| {
            let (bytes, count) = (s.totals.outstanding_bytes(), s.totals.outstanding_count());
            [Value::Integer(integer(bytes)), Value::Integer(integer(count)), Value::Number(s.time_s)]
        })
        .into_iter()
        .flatten()
        .collect()
}

/// Adds methods without arguments that return a cached statistic.
macro_rules! stat_methods {
    ($methods:ident, $($name:literal => $stat:expr),+ $(,)?) => {
        $($methods.add_method($name, |_, this: &SeriesRef, ()| this.with(|s| s.stat($stat, this.range)));)+
    };
}

impl UserData for SeriesRef {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        stat_methods!(methods,
            "slope" => Stat::Slope,
            "count_slope" => Stat::CountSlope,
            "rising_fraction" => Stat::RisingFraction,
            "rises" => Stat::Rises,
            "trend_confidence" => Stat::TrendConfidence,
            "level_off" => Stat::LevelOff,
            "largest_drop" => Stat::LargestDrop,
            "noise" => Stat::Noise,
            "max" => Stat::Max,
            "min" => Stat::Min,
        );
        methods.add_meta_method("__len", |_, this, _: Value| this.samples(<[Sample]>::len));
        methods.add_method("duration", |_, this, ()| this.change(|s| s.time_s));
        methods.add_method("growth", |_, this, ()| this.change(|s| s.totals.outstanding_bytes() as f64));
        methods.add_method("allocated", |_, this, ()| {
            let bytes = this.change(|s| s.totals.allocated_bytes as f64)?;
            Ok((bytes, this.change(|s| s.totals.allocated_count as f64)?))
        });
        methods.add_method("freed", |_, this, ()| {
            let bytes = this.change(|s| s.totals.freed_bytes as f64)?;
            Ok((bytes, this.change(|s| s.totals.freed_count as f64)?))
        });
        methods.add_method("rate", |_, this, ()| {
            this.samples(|samples| {
                let ends = [samples.first(), samples.last()];
                let points = ends.map(|s| s.map_or((0.0, 0.0), |s| (s.time_s, s.totals.outstanding_bytes() as f64)));
                stats::rate(&points)
            })
        });
        methods.add_method("first", |_, this, ()| this.samples(|s| sample_values(s.first())));
        methods.add_method("last", |_, this, ()| this.samples(|s| sample_values(s.last())));
        methods.add_method("at", |_, this, i: Integer| {
            this.samples(|samples| {
                let index = if i < 0 { samples.len() as Integer + i } else { i - 1 };
                sample_values(usize::try_from(index).ok().and_then(|i| samples.get(i)))
            })
        });
        methods.add_method("recent", |_, this, n: u32| {
            Ok(this.part(this.range.1.saturating_sub(n).max(this.range.0), this.range.1))
        });
        methods.add_method("window", |_, this, (seconds, snapshots): (f64, Option<u32>)| {
            Ok(this.part(this.window_start(seconds, snapshots)?, this.range.1))
        });
        methods.add_method("before", |_, this, (seconds, snapshots): (f64, Option<u32>)| {
            Ok(this.part(this.range.0, this.window_start(seconds, snapshots)?))
        });
    }
}

/// A process of the snapshot.
struct ProcessRef {
    context: Rc<Context>,
    epoch: u64,
    instance: u32,
}

impl ProcessRef {
    /// `None` inside when the history does not know the process.
    fn with<R>(&self, look: impl FnOnce(&super::view::ProcessView) -> R) -> mlua::Result<Option<R>> {
        self.context.with(self.epoch, |view| view.process(self.instance).map(look)).ok_or_else(stale)
    }
}

impl UserData for ProcessRef {
    fn add_fields<F: UserDataFields<Self>>(fields: &mut F) {
        fields.add_field_method_get("pid", |_, this| this.with(|p| p.sample.process.pid));
        fields.add_field_method_get("mode", |_, this| this.with(|p| mode(p.sample.mode)));
        fields.add_field_method_get("ended", |_, this| Ok(this.context.ending().map(Ending::as_str)));
        fields.add_field_method_get("comm", |_, this| this.with(|p| p.sample.process.comm.clone()));
        fields.add_field_method_get("exe", |_, this| this.with(|p| p.sample.process.exe.clone()));
        fields.add_field_method_get("cmdline", |_, this| this.with(|p| p.sample.process.cmdline.clone()));
        type Label = fn(&Labels) -> &Option<String>;
        let labels: [(&str, Label); 5] = [
            ("container", |l| &l.container),
            ("runtime", |l| &l.runtime),
            ("pod", |l| &l.pod),
            ("unit", |l| &l.unit),
            ("slice", |l| &l.slice),
        ];
        for (name, label) in labels {
            fields.add_field_method_get(name, move |_, this| {
                Ok(this.with(|p| label(&p.sample.process.labels).clone())?.flatten())
            });
        }
        fields
            .add_field_method_get("rss_bytes", |_, this| Ok(this.with(|p| p.sample.rss_bytes.map(integer))?.flatten()));
        fields.add_field_method_get("rss_anon_bytes", |_, this| {
            Ok(this.with(|p| p.sample.rss_anon_bytes.map(integer))?.flatten())
        });
        fields.add_field_method_get("window_s", |_, this| Ok(this.with(|p| p.sample.window_s)?.flatten()));
        fields.add_field_method_get("hits", |_, this| this.with(|p| integer(p.sample.hits)));
        fields.add_field_method_get("unmatched_frees", |_, this| this.with(|p| integer(p.sample.unmatched_frees)));
        fields.add_field_method_get("losses", |lua, this| {
            let losses = this.with(|p| p.sample.losses)?.unwrap_or_default();
            lua.create_table_from(losses.entries().map(|(name, n)| (name, integer(n))))
        });
    }

    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("unmatched_rate", |_, this, seconds: f64| this.with(|p| p.unmatched_rate(seconds)));
        methods.add_method("rss_anon_slope", |_, this, seconds: f64| {
            Ok(this.with(|p| p.rss_anon_slope(seconds))?.flatten())
        });
        methods.add_method("rss_slope", |_, this, seconds: f64| Ok(this.with(|p| p.rss_slope(seconds))?.flatten()));
    }
}

/// The snapshot as a whole, for `evaluate_snapshot`.
pub(super) struct SnapshotRef {
    context: Rc<Context>,
    epoch: u64,
}

impl SnapshotRef {
    pub(super) fn new(context: &Rc<Context>) -> Self {
        SnapshotRef { context: Rc::clone(context), epoch: context.epoch() }
    }

    fn with<R>(&self, look: impl FnOnce(&View) -> R) -> mlua::Result<R> {
        self.context.with(self.epoch, look).ok_or_else(stale)
    }
}

impl UserData for SnapshotRef {
    fn add_fields<F: UserDataFields<Self>>(fields: &mut F) {
        fields.add_field_method_get("time_s", |_, this| this.with(|v| v.time_s));
        fields.add_field_method_get("number", |_, this| this.with(|v| integer(v.snapshots)));
        fields.add_field_method_get("sites", |lua, this| {
            let places = this.with(|v| v.by_size().to_vec())?;
            let list = lua.create_table_with_capacity(places.len(), 0)?;
            for place in places {
                let site = SiteRef { context: Rc::clone(&this.context), epoch: this.epoch, place };
                list.raw_push(site)?;
            }
            Ok(list)
        });
        fields.add_field_method_get("processes", |lua, this| {
            let instances = this.with(|v| v.processes.iter().map(|p| p.sample.process.instance).collect::<Vec<_>>())?;
            let list = lua.create_table_with_capacity(instances.len(), 0)?;
            for instance in instances {
                list.raw_push(ProcessRef { context: Rc::clone(&this.context), epoch: this.epoch, instance })?;
            }
            Ok(list)
        });
        fields.add_field_method_get("totals", |_, this| {
            let end = this.with(|v| v.totals().samples.len())? as u32;
            let context = Rc::clone(&this.context);
            Ok(SeriesRef { context, epoch: this.epoch, owner: Owner::Totals, range: (0, end) })
        });
    }
}

/// The `units` table: numbers to text for people.
pub(super) fn units_table(lua: &Lua) -> mlua::Result<Table> {
    let table = lua.create_table()?;
    // A float to integer cast saturates, and NaN becomes 0.
    table.raw_set("bytes", lua.create_function(|_, n: f64| Ok(units::format_bytes(n as u64)))?)?;
    table.raw_set("rate", lua.create_function(|_, n: f64| Ok(units::format_rate(n)))?)?;
    table.raw_set("duration", lua.create_function(|_, s: f64| Ok(units::format_duration_s(s)))?)?;
    table.raw_set("count", lua.create_function(|_, n: f64| Ok(format_count(n)))?)?;
    table.raw_set("percent", lua.create_function(|_, share: f64| Ok(format_percent(share)))?)?;
    Ok(table)
}

/// A count with its thousands set apart: `1,234,567`.
fn format_count(n: f64) -> String {
    let digits = (n.abs().round() as u64).to_string();
    let mut text = String::new();
    if n <= -0.5 {
        text.push('-');
    }
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A share as per cent: `12 %`, `1.5 %`, `0.03 %`.
fn format_percent(share: f64) -> String {
    let percent = share * 100.0;
    match percent.abs() {
        p if p >= 9.95 || p == 0.0 => format!("{percent:.0} %"),
        p if p >= 0.095 => format!("{percent:.1} %"),
        _ => format!("{percent:.2} %"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Thousands are grouped from the right and the sign stays.
    #[test]
    fn counts_are_grouped() {
        let texts = [0.0, 7.0, 999.0, 1000.0, 1_234_567.0, -4321.4].map(format_count);
        assert_eq!(texts, ["0", "7", "999", "1,000", "1,234,567", "-4,321"]);
    }

    /// Small shares keep digits that matter.
    #[test]
    fn percentages_keep_small_shares_visible() {
        assert_eq!([0.5, 0.0123, 0.0003, 0.0, 1.0].map(format_percent), ["50 %", "1.2 %", "0.03 %", "0 %", "100 %"]);
    }
}
