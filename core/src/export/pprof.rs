//! A profile as pprof reads it: `profile.proto` of github.com/google/pprof, compressed with gzip.
//!
//! Four values per stack, in the order that pprof knows from heap profiles: allocated blocks and bytes, blocks and bytes
//! in use (outstanding). Labels carry process, probe set, allocator function, and the thread that allocated there first
//! (counts are per stack: there is no other thread to name). Every location has a name, even if it
//! is only module and offset: pprof would otherwise look for the module on the reader's machine and name addresses by
//! whatever lies there, because a recording does not say where in memory a module began.

use std::collections::HashMap;
use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::names;
use super::proto::Message;
use crate::error::{Error, Result};
use crate::snapshot::{SiteSample, Snapshot};
use crate::symbolize::Frame;

/// Numbers of the fields of `Profile`.
mod field {
    pub(super) const SAMPLE_TYPE: u64 = 1;
    pub(super) const SAMPLE: u64 = 2;
    pub(super) const MAPPING: u64 = 3;
    pub(super) const LOCATION: u64 = 4;
    pub(super) const FUNCTION: u64 = 5;
    pub(super) const STRING_TABLE: u64 = 6;
    pub(super) const TIME_NANOS: u64 = 9;
    pub(super) const DURATION_NANOS: u64 = 10;
    pub(super) const PERIOD_TYPE: u64 = 11;
    pub(super) const PERIOD: u64 = 12;
    pub(super) const COMMENT: u64 = 13;
    pub(super) const DEFAULT_SAMPLE_TYPE: u64 = 14;
}

/// What is measured, with its unit.
const VALUES: [(&str, &str); 4] =
    [("alloc_objects", "count"), ("alloc_space", "bytes"), ("inuse_objects", "count"), ("inuse_space", "bytes")];

/// Memory is dealt out in pages of this size; mappings begin and end with them.
const PAGE: u64 = 4096;

/// A mapped file of a process; modules of different processes lie at different addresses.
type MappingKey = (u32, String);
/// A call instruction: process, address, and the functions there with their lines, innermost first.
type LocationKey = (u32, u64, Vec<(u64, u64)>);

#[derive(Default)]
struct Profile {
    out: Message,
    strings: Vec<String>,
    string_numbers: HashMap<String, u64>,
    mappings: HashMap<MappingKey, u64>,
    functions: HashMap<(u64, u64), u64>,
    locations: HashMap<LocationKey, u64>,
}

/// What is known of a mapped file.
struct Mapping {
    instance: u32,
    module: String,
    build_id: String,
    is_exe: bool,
    start: u64,
    limit: u64,
}

pub(super) fn encode(snapshot: &Snapshot) -> Result<Vec<u8>> {
    let mut profile = Profile::default();
    // The first string is empty by definition.
    profile.string("");
    for (kind, unit) in VALUES {
        profile.value_type(field::SAMPLE_TYPE, kind, unit);
    }
    profile.map(snapshot);
    for s in &snapshot.sites {
        profile.sample(s);
    }
    let nanos = |s: f64| (s * 1e9) as u64;
    profile.out.number(field::TIME_NANOS, nanos(snapshot.wall_s));
    profile.out.number(field::DURATION_NANOS, nanos(snapshot.time_s));
    profile.value_type(field::PERIOD_TYPE, "space", "bytes");
    profile.out.number(field::PERIOD, 1);
    let comment = profile.string(&super::description(snapshot));
    profile.out.numbers(field::COMMENT, &[comment]);
    let default = profile.string("inuse_space");
    profile.out.number(field::DEFAULT_SAMPLE_TYPE, default);
    // At the end, when every string is known; readers do not mind the order.
    let strings = std::mem::take(&mut profile.strings);
    for text in &strings {
        profile.out.bytes(field::STRING_TABLE, text.as_bytes());
    }
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    let compressed = gzip.write_all(&profile.out.into_bytes()).and_then(|()| gzip.finish());
    compressed.map_err(|e| Error::io("failed to compress the profile", e))
}

impl Profile {
    fn string(&mut self, text: &str) -> u64 {
        if let Some(number) = self.string_numbers.get(text) {
            return *number;
        }
        let number = self.strings.len() as u64;
        self.strings.push(text.to_owned());
        self.string_numbers.insert(text.to_owned(), number);
        number
    }

    fn value_type(&mut self, field: u64, kind: &str, unit: &str) {
        let (kind, unit) = (self.string(kind), self.string(unit));
        self.out.message(field, |m| {
            m.number(1, kind);
            m.number(2, unit);
        });
    }

    /// Writes the mapped files, the executable first: pprof names the profile after the first one.
    fn map(&mut self, snapshot: &Snapshot) {
        let mut mappings: HashMap<MappingKey, Mapping> = HashMap::new();
        let mut order: Vec<MappingKey> = Vec::new();
        for s in &snapshot.sites {
            for f in names::frames(&s.site).iter() {
                let Some(module) = &f.module else { continue };
                let key = (s.site.key.instance, module.clone());
                let mapping = mappings.entry(key.clone()).or_insert_with(|| {
                    order.push(key);
                    Mapping {
                        instance: s.site.key.instance,
                        module: module.clone(),
                        build_id: f.build_id.clone().unwrap_or_default(),
                        is_exe: *module == s.site.process.exe,
                        start: u64::MAX,
                        limit: 0,
                    }
                });
                mapping.start = mapping.start.min(f.address / PAGE * PAGE);
                mapping.limit = mapping.limit.max((f.address / PAGE).saturating_add(1).saturating_mul(PAGE));
            }
        }
        let mut mappings: Vec<Mapping> = order.iter().filter_map(|key| mappings.remove(key)).collect();
        mappings.sort_by_key(|m| !m.is_exe);
        for (m, id) in mappings.into_iter().zip(1..) {
            let (file, build_id) = (self.string(&names::shown(&m.module)), self.string(&names::shown(&m.build_id)));
            self.out.message(field::MAPPING, |out| {
                out.number(1, id);
                out.number(2, m.start);
                out.number(3, m.limit);
                out.number(5, file);
                out.number(6, build_id);
                // Functions, files, lines, inlined frames: pprof need not look for any of them.
                (7..=10).for_each(|what| out.flag(what, true));
            });
            self.mappings.insert((m.instance, m.module), id);
        }
    }

    fn sample(&mut self, s: &SiteSample) {
        let t = &s.totals;
        let values = [t.allocated_count, t.allocated_bytes, t.outstanding_count(), t.outstanding_bytes()];
        // pprof's numbers have a sign.
        let values = values.map(|v| v.min(i64::MAX as u64));
        let frames = names::frames(&s.site);
        let mut locations = Vec::new();
        let mut rest: &[Frame] = &frames;
        while let Some(first) = rest.first() {
            // Inlined calls and the function that they were compiled into are one location.
            let length = rest.iter().position(|f| !f.inlined).map_or(rest.len(), |i| i + 1);
            let (lines, after) = rest.split_at(length);
            locations.push(self.location(s.site.key.instance, first.address, lines));
            rest = after;
        }
        if locations.is_empty() {
            let nowhere = Frame { function: Some("unknown caller".to_owned()), ..Frame::default() };
            locations.push(self.location(s.site.key.instance, 0, &[nowhere]));
        }
        let site = &s.site;
        let id = format!("{:016x}", site.id);
        let mut labels: Vec<(u64, u64)> = Vec::new();
        let thread = site.first_thread.as_ref();
        for (key, text) in [
            ("comm", &*site.process.comm),
            ("probe_set", &site.probe_set),
            ("allocator", &site.function),
            ("first_thread", thread.map_or("", |t| &*t.name)),
            ("site", &id),
        ] {
            if !text.is_empty() {
                labels.push((self.string(key), self.string(&names::shown(text))));
            }
        }
        let mut numbers = vec![(self.string("pid"), site.process.pid)];
        if let Some(thread) = thread.filter(|t| t.tid != 0) {
            numbers.push((self.string("first_tid"), thread.tid));
        }
        self.out.message(field::SAMPLE, |out| {
            out.numbers(1, &locations);
            out.numbers(2, &values);
            for (key, text) in labels {
                out.message(3, |label| {
                    label.number(1, key);
                    label.number(2, text);
                });
            }
            for (key, number) in numbers {
                out.message(3, |label| {
                    label.number(1, key);
                    label.number(3, u64::from(number));
                });
            }
        });
    }

    fn location(&mut self, instance: u32, address: u64, frames: &[Frame]) -> u64 {
        let lines: Vec<(u64, u64)> = frames.iter().map(|f| (self.function(f), f.line.map_or(0, u64::from))).collect();
        let key = (instance, address, lines);
        if let Some(id) = self.locations.get(&key) {
            return *id;
        }
        let id = self.locations.len() as u64 + 1;
        let module = frames.iter().find_map(|f| f.module.clone());
        let mapping = module.and_then(|m| self.mappings.get(&(instance, m)).copied()).unwrap_or(0);
        self.out.message(field::LOCATION, |out| {
            out.number(1, id);
            out.number(2, mapping);
            out.number(3, address);
            for (function, line) in &key.2 {
                out.message(4, |m| {
                    m.number(1, *function);
                    m.number(2, *line);
                });
            }
        });
        self.locations.insert(key, id);
        id
    }

    fn function(&mut self, f: &Frame) -> u64 {
        let name = self.string(&names::frame(f));
        let file = self.string(&f.file.as_deref().map(names::shown).unwrap_or_default());
        if let Some(id) = self.functions.get(&(name, file)) {
            return *id;
        }
        let id = self.functions.len() as u64 + 1;
        self.out.message(field::FUNCTION, |out| {
            out.number(1, id);
            out.number(2, name);
            out.number(3, name);
            out.number(4, file);
        });
        self.functions.insert((name, file), id);
        id
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::sample;
    use std::io::Read;

    /// One field of a message: its number, and its value or bytes.
    #[derive(Debug)]
    enum Field {
        Number(u64),
        Bytes(Vec<u8>),
    }

    fn varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let byte = bytes[0];
            *bytes = &bytes[1..];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        value
    }

    fn fields(mut bytes: &[u8]) -> Vec<(u64, Field)> {
        let mut out = Vec::new();
        while !bytes.is_empty() {
            let tag = varint(&mut bytes);
            let field = match tag & 7 {
                0 => Field::Number(varint(&mut bytes)),
                2 => {
                    let length = varint(&mut bytes) as usize;
                    let (inner, rest) = bytes.split_at(length);
                    bytes = rest;
                    Field::Bytes(inner.to_vec())
                }
                other => panic!("wire type {other}"),
            };
            out.push((tag >> 3, field));
        }
        out
    }

    fn messages(fields: &[(u64, Field)], number: u64) -> Vec<Vec<(u64, Field)>> {
        let bytes = |(n, f): &(u64, Field)| match f {
            Field::Bytes(b) if *n == number => Some(b.clone()),
            _ => None,
        };
        fields.iter().filter_map(bytes).map(|b| self::fields(&b)).collect()
    }

    fn number(fields: &[(u64, Field)], number: u64) -> u64 {
        fields
            .iter()
            .find_map(|(n, f)| matches!(f, Field::Number(_) if *n == number).then_some(f))
            .map_or(0, |f| if let Field::Number(n) = f { *n } else { 0 })
    }

    fn packed(fields: &[(u64, Field)], number: u64) -> Vec<u64> {
        let mut out = Vec::new();
        for (n, f) in fields {
            if let (true, Field::Bytes(b)) = (*n == number, f) {
                let mut b = b.as_slice();
                while !b.is_empty() {
                    out.push(varint(&mut b));
                }
            }
        }
        out
    }

    /// Read back field by field: values, shared locations, inlined lines, labels, mappings and build ids.
    #[test]
    fn a_profile_says_what_the_snapshot_says() {
        let mut bytes = Vec::new();
        let zipped = encode(&sample::typical()).expect("profile");
        flate2::read::GzDecoder::new(zipped.as_slice()).read_to_end(&mut bytes).expect("gzip");
        let profile = fields(&bytes);
        let strings: Vec<String> = (profile.iter())
            .filter_map(|(n, f)| match f {
                Field::Bytes(b) if *n == field::STRING_TABLE => Some(String::from_utf8(b.clone()).expect("text")),
                _ => None,
            })
            .collect();
        let text = |n: u64| strings[n as usize].as_str();
        assert_eq!(strings[0], "");
        assert_eq!(text(number(&profile, field::DEFAULT_SAMPLE_TYPE)), "inuse_space");
        assert_eq!(number(&profile, field::TIME_NANOS), 1_772_443_800_000_000_000);
        assert_eq!(number(&profile, field::DURATION_NANOS), 60_000_000_000);

        let samples = messages(&profile, field::SAMPLE);
        let values: Vec<Vec<u64>> = samples.iter().map(|s| packed(s, 2)).collect();
        assert_eq!(values, [[130, 1_300, 100, 1_000], [7, 70, 7, 70], [3, 30, 1, 10]]);
        let stacks: Vec<Vec<u64>> = samples.iter().map(|s| packed(s, 1)).collect();
        assert_eq!(stacks, [vec![1, 2], vec![3, 4, 2], vec![5]]);
        let labels: Vec<(&str, String)> = (messages(&samples[0], 3).iter())
            .map(|l| match number(l, 2) {
                0 => (text(number(l, 1)), number(l, 3).to_string()),
                s => (text(number(l, 1)), text(s).to_owned()),
            })
            .collect();
        let expected = [
            ("comm", "shop"),
            ("probe_set", "glibc"),
            ("allocator", "malloc"),
            ("first_thread", "worker 1"),
            ("site", "0000000000000001"),
            ("pid", "4711"),
            ("first_tid", "4712"),
        ];
        assert_eq!(labels, expected.map(|(k, v)| (k, v.to_owned())));

        let functions = messages(&profile, field::FUNCTION);
        let name = |id: u64| text(number(&functions[id as usize - 1], 2));
        let locations = messages(&profile, field::LOCATION);
        let lines: Vec<Vec<(&str, u64)>> = (locations.iter())
            .map(|l| messages(l, 4).iter().map(|line| (name(number(line, 1)), number(line, 2))).collect())
            .collect();
        assert_eq!(lines[0], [("inner", 7), ("outer", 7)]);
        assert_eq!(lines[1], [("main", 7)]);
        assert_eq!(lines[2][0].0, r#"=cmd|'/c'!A1;"</script>\n\u{202e},x 7"#);
        assert_eq!(lines[3], [("shop+0x77", 0)]);
        assert_eq!(lines[4], [("unknown caller", 0)]);
        let mappings = messages(&profile, field::MAPPING);
        assert_eq!(mappings.len(), 1);
        let m = &mappings[0];
        assert_eq!((number(m, 2), number(m, 3)), (0x5000, 0xa000));
        assert_eq!((text(number(m, 5)), text(number(m, 6)), number(m, 7)), ("/opt/shop", "ab12", 1));
        assert!(locations[..4].iter().all(|l| number(l, 2) == 1), "{locations:?}");
    }
}
