//! `memleak symbolize`: puts names into a report that was written where there were no symbols.
//!
//! A report knows each place in code by build id and address. Given the debug files, this names them: in the data of an
//! HTML report, from which its page draws everything, and in the lines of `--json` and of alerts. Nothing else of the
//! file changes. Files that are no report, or too large, are refused, and the result replaces a file as a whole or not
//! at all. The file is somebody else's: whatever its numbers say, nothing outside of it is reached.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Value, json};

use crate::error::{Error, ErrorKind, Result};
use crate::output::filters::script_json;
use crate::output::text::visible;
use crate::output::{alerts, atomic, report};
use crate::symbolize::Frame;
use crate::symbolize::offline::DebugFolders;

/// Largest report that is read, in bytes.
const MAX_BYTES: u64 = 256 << 20;
const DATA_START: &str = "<script type=\"application/json\" id=\"data\">";
const DATA_END: &str = "</script>";
/// Numbers of a frame in the page's data, see `output/report/page.rs`.
const FRAME: usize = 9;

/// What became of the places without a source line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Places that have a name or a line now that they did not have.
    pub named: usize,
    /// Places that stay as they were.
    pub left: usize,
    /// Build ids for which there is no file, sorted.
    pub missing: Vec<String>,
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "named {} of {} places in code", self.named, self.named + self.left)?;
        for id in &self.missing {
            writeln!(f, "no debug file has build id {id}")?;
        }
        Ok(())
    }
}

/// Names the places in the report at `path` and writes the result to `out`, which may be the same.
///
/// # Errors
/// The file cannot be read, is no report of this version, or has nothing to be named; or `out` cannot be written.
pub fn symbolize(path: &Path, folders: &mut DebugFolders, out: &Path) -> Result<Summary> {
    let shown = visible(&path.to_string_lossy()).into_owned();
    let refuse = |why: &str| Error::new(ErrorKind::Config, format!("failed to symbolize {shown}: {why}"));
    let text = read(path).map_err(|e| Error::io(format!("failed to read {shown}"), e))?;
    let text = text.ok_or_else(|| refuse(&format!("it is larger than {} MiB", MAX_BYTES >> 20)))?;
    let text = String::from_utf8(text).map_err(|_| refuse("it is no report of memleak: it is not text"))?;
    let mut names = Names { folders, summary: Summary::default(), missing: HashSet::new() };
    let new = if let Some((before, rest)) = text.split_once(DATA_START) {
        let (data, after) = rest.split_once(DATA_END).ok_or_else(|| refuse("its data has no end: it was cut short"))?;
        let mut data: Value = serde_json::from_str(data).map_err(|e| refuse(&format!("its data is malformed: {e}")))?;
        names.page(&mut data).ok_or_else(|| {
            refuse("its data has another form; it was written by another version of memleak, or changed")
        })?;
        format!("{before}{DATA_START}{}{DATA_END}{after}", script_json(&data.to_string()))
    } else if text.trim_start().starts_with('{') {
        let mut new = String::with_capacity(text.len());
        for (line, number) in text.lines().zip(1..) {
            let malformed =
                |e: String| refuse(&format!("line {number} is no line of `memleak --json` or of alerts: {e}"));
            let mut value: Value = serde_json::from_str(line).map_err(|e| malformed(e.to_string()))?;
            names.line(&mut value).ok_or_else(|| malformed("it has another form".to_owned()))?;
            new.push_str(&alerts::json_line(&value)?);
            new.push('\n');
        }
        new
    } else {
        return Err(refuse("it is no HTML report of memleak and has no lines of its JSON"));
    };
    let Names { mut summary, missing, .. } = names;
    summary.missing = missing.into_iter().collect();
    summary.missing.sort();
    if summary.named == 0 {
        let why = match (summary.left, summary.missing.first()) {
            (0, _) => "every place in it that has a build id is named already".to_owned(),
            (_, Some(id)) => format!("no debug file belongs to it; it needs one with build id {id}"),
            (_, None) => "the debug files have no names for it".to_owned(),
        };
        return Err(refuse(&why));
    }
    atomic::write(out, new.as_bytes())?;
    Ok(summary)
}

/// The file's contents; `None` when it is too large.
fn read(path: &Path) -> std::io::Result<Option<Vec<u8>>> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let mut data = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut data)?;
    Ok((data.len() as u64 <= MAX_BYTES).then_some(data))
}

struct Names<'a> {
    folders: &'a mut DebugFolders,
    summary: Summary,
    missing: HashSet<String>,
}

impl Names<'_> {
    /// Frames of a place; empty when there is nothing new.
    fn frames(&mut self, build_id: &str, address: u64, had_name: bool) -> Vec<Frame> {
        let mut frames = self.folders.frames(build_id, address);
        if had_name && frames.iter().all(|f| f.line.is_none()) {
            frames.clear();
        }
        match frames.is_empty() {
            true => {
                self.summary.left += 1;
                if !self.folders.has(build_id) {
                    self.missing.insert(visible(build_id).chars().take(128).collect());
                }
            }
            false => self.summary.named += 1,
        }
        frames
    }

    /// Names the frames in the data of a page; `None` when that has another form.
    fn page(&mut self, data: &mut Value) -> Option<()> {
        let mut strings: Vec<Value> = std::mem::take(data.get_mut("strings")?.as_array_mut()?);
        let old: Vec<[i64; FRAME]> = (data.get("frames")?.as_array()?.iter())
            .map(|f| f.as_array()?.iter().map(Value::as_i64).collect::<Option<Vec<_>>>()?.try_into().ok())
            .collect::<Option<_>>()?;
        // A report that was symbolized before still has the frames that were replaced.
        let mut used: HashSet<u64> = HashSet::new();
        for site in data.get("sites")?.as_array()? {
            used.extend(site.get("stack")?.as_array()?.iter().filter_map(Value::as_u64));
        }
        let mut numbers: HashMap<String, i64> = HashMap::new();
        let mut new = old.clone();
        // Of each old frame the frames that take its place.
        let mut instead: HashMap<usize, Vec<usize>> = HashMap::new();
        for (i, frame) in old.iter().enumerate() {
            let [function, module, _, _, line, inlined, _, build_id, address] = *frame;
            let (Ok(build_id), Ok(address)) = (usize::try_from(build_id), u64::try_from(address)) else { continue };
            if line >= 0 || inlined != 0 || !used.contains(&(i as u64)) {
                continue;
            }
            let id = strings.get(build_id)?.as_str()?.to_owned();
            let mut intern = |text: &str| {
                *numbers.entry(text.to_owned()).or_insert_with(|| {
                    strings.push(Value::String(text.to_owned()));
                    strings.len() as i64 - 1
                })
            };
            let named = self.frames(&id, address, function >= 0);
            let places = named.into_iter().map(|f| {
                let optional = |text: Option<&str>| text.map(|t| visible(t).into_owned());
                let (function, file) = (optional(f.function.as_deref()), optional(f.file.as_deref()));
                new.push([
                    function.map_or(-1, |t| intern(&t)),
                    module,
                    intern(&format!("{:#x}", f.offset)),
                    file.map_or(-1, |t| intern(&t)),
                    f.line.map_or(-1, i64::from),
                    i64::from(f.inlined),
                    -1,
                    frame[7],
                    frame[8],
                ]);
                new.len() - 1
            });
            let places: Vec<usize> = places.collect();
            if !places.is_empty() {
                instead.insert(i, places);
            }
        }
        let text = |n: i64| usize::try_from(n).ok().and_then(|n| strings.get(n)?.as_str());
        for site in data.get_mut("sites")?.as_array_mut()? {
            let stack = site.get("stack")?.as_array()?;
            let mut renewed: Vec<usize> = Vec::with_capacity(stack.len());
            for number in stack {
                let number = usize::try_from(number.as_u64()?).ok()?;
                let after_inlined = renewed.last().is_some_and(|last| new[*last][5] != 0);
                old.get(number)?;
                match instead.get(&number) {
                    None => renewed.push(number),
                    // What was inlined there is known already.
                    Some(places) if after_inlined => renewed.extend(places.last()),
                    Some(places) => renewed.extend(places),
                }
            }
            let frames: Vec<Frame> = (renewed.iter())
                .map(|n| Frame {
                    function: text(new[*n][0]).map(str::to_owned),
                    module: text(new[*n][1]).map(str::to_owned),
                    ..Frame::default()
                })
                .collect();
            if let Some(head) = report::heading(&frames) {
                site["head"] = json!(head);
            }
            site["stack"] = json!(renewed);
        }
        data["strings"] = Value::Array(strings);
        data["frames"] = json!(new);
        Some(())
    }

    /// Names the frames of a line; `None` when it has another form.
    fn line(&mut self, line: &mut Value) -> Option<()> {
        match line.get("type")?.as_str()? {
            "snapshot" => line.get_mut("sites")?.as_array_mut()?.iter_mut().try_for_each(|site| self.stack(site)),
            "alert" => self.stack(line.get_mut("site")?),
            _ => Some(()),
        }
    }

    /// Names the frames of a site in a line.
    fn stack(&mut self, site: &mut Value) -> Option<()> {
        let frames = site.get_mut("frames")?.as_array_mut()?;
        let mut renewed: Vec<Value> = Vec::with_capacity(frames.len());
        for frame in frames.drain(..) {
            let address = match &frame["file_address"] {
                Value::String(hex) => hex.strip_prefix("0x").and_then(|h| u64::from_str_radix(h, 16).ok()),
                number => number.as_u64(),
            };
            let wanted = frame["line"].is_null() && frame["inlined"] == false;
            let (Some(id), Some(address), true) = (frame["build_id"].as_str(), address, wanted) else {
                renewed.push(frame);
                continue;
            };
            let after_inlined = renewed.last().is_some_and(|f| f["inlined"] == true);
            let named = self.frames(id, address, frame["function"].is_string());
            let skip = if after_inlined { named.len().saturating_sub(1) } else { 0 };
            if named.is_empty() {
                renewed.push(frame);
                continue;
            }
            for f in named.into_iter().skip(skip) {
                let mut new = frame.clone();
                new["function"] = json!(f.function);
                new["offset"] = json!(f.offset);
                new["file"] = json!(f.file);
                new["line"] = json!(f.line);
                new["inlined"] = json!(f.inlined);
                new["reason"] = Value::Null;
                renewed.push(new);
            }
        }
        *frames = renewed;
        Some(())
    }
}
