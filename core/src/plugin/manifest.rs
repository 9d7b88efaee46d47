//! The file format of a manifest, and its translation into what the kernel side wants.
//!
//! Checks everything that can be checked without a file to attach to; every mistake is named with the manifest and the
//! function.

use std::collections::HashSet;

use globset::{Glob, GlobSet, GlobSetBuilder};
use memleak_probes::{FunctionSpec, ProbeSetSpec, Returns, Role, SetKind, Size};
use serde::Deserialize;

use super::Plugin;
use super::matching::Matching;
use crate::{Error, Result};

/// Arguments that can be read: those that the calling conventions pass in registers.
const MAX_ARGUMENTS: u8 = 6;

/// The file format.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    name: String,
    kind: Kind,
    #[serde(default)]
    description: String,
    #[serde(default = "yes")]
    enabled: bool,
    #[serde(default = "memory")]
    domain: String,
    #[serde(default, rename = "match")]
    matching: Option<ManifestMatching>,
    #[serde(default, rename = "function")]
    functions: Vec<Function>,
}

pub(super) fn yes() -> bool {
    true
}

fn memory() -> String {
    "memory".into()
}

fn no_prefix() -> Vec<String> {
    vec![String::new()]
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    Userspace,
    Usdt,
    Kernel,
}

/// Just enough of a manifest to know how to read it.
#[derive(Debug, Deserialize)]
struct KindOnly {
    kind: Kind,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestMatching {
    #[serde(default)]
    sonames: Vec<String>,
    #[serde(default)]
    except: Vec<String>,
    #[serde(default)]
    defines: Vec<String>,
    #[serde(default)]
    exports: Vec<String>,
    #[serde(default = "no_prefix")]
    prefixes: Vec<String>,
    #[serde(default)]
    fallback: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Function {
    #[serde(default)]
    symbol: Option<String>,
    #[serde(default)]
    symbols: Vec<String>,
    role: ManifestRole,
    #[serde(default)]
    size: Option<ManifestSize>,
    #[serde(default, alias = "block")]
    old: Option<Argument>,
    #[serde(default)]
    returns: ManifestReturns,
    #[serde(default)]
    range: bool,
    #[serde(default)]
    optional: bool,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum ManifestRole {
    Alloc,
    Realloc,
    Free,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Argument {
    arg: u8,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestSize {
    arg: Option<u8>,
    times: Option<u8>,
    #[serde(rename = "const")]
    constant: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestReturns {
    pointer_in_arg: Option<u8>,
    ok: Option<i32>,
    failed: Option<i64>,
    #[serde(default)]
    in_place: bool,
    block_in_arg: Option<u8>,
}

/// Parses and checks one manifest.
pub(super) fn parse(text: &str, origin: &str, number: usize) -> Result<Plugin> {
    if let Ok(KindOnly { kind: Kind::Kernel }) = toml::from_str(text) {
        return parse_kernel(text, origin, number);
    }
    let manifest: Manifest =
        toml::from_str(text).map_err(|e| Error::config(format!("{origin}: {}", e.to_string().trim_end())))?;
    let wrong = |what: String| Error::config(format!("{origin}: {what}"));
    let Manifest { name, kind, description, enabled, domain, matching, functions } = manifest;
    if !is_name(&name) || !is_name(&domain) {
        return Err(wrong("name and domain consist of letters, digits, - and _".into()));
    }
    let kind = match kind {
        Kind::Userspace => SetKind::Functions,
        Kind::Usdt => SetKind::Tracepoints,
        // Read elsewhere, unless the file is so wrong that not even its kind could be told.
        Kind::Kernel => return Err(wrong("is no manifest of the kernel".into())),
    };
    let matching = match (matching, kind) {
        (Some(matching), _) => matching,
        (None, SetKind::Tracepoints) => ManifestMatching::of_tracepoints(&functions),
        (None, SetKind::Functions) => return Err(wrong("the table [match] is missing".into())),
    };
    let matching = matching.check().map_err(&wrong)?;
    let mut seen = HashSet::new();
    let mut specs = Vec::new();
    for function in &functions {
        for symbol in function.named().map_err(&wrong)? {
            let at = |what: &str| wrong(format!("function {symbol}: {what}"));
            if !seen.insert(symbol) {
                return Err(at("named twice"));
            }
            let spec = function.to_spec(symbol).map_err(|what| at(&what))?;
            if kind == SetKind::Tracepoints {
                check_tracepoint(&spec).map_err(|what| at(&what))?;
            }
            specs.push(spec);
        }
    }
    for (role, verb) in [(Role::Alloc, "hands out a block"), (Role::Free, "takes a block back")] {
        let some = specs.iter().any(|f| f.role == role || f.role == Role::Realloc);
        if !some {
            return Err(wrong(format!("no function {verb}")));
        }
    }
    let spec = ProbeSetSpec {
        kind,
        number: u32::try_from(number).unwrap_or(u32::MAX),
        name,
        domain,
        prefixes: matching.prefixes.clone(),
        functions: specs,
    };
    Ok(Plugin { spec, description, enabled, origin: origin.to_owned(), matching, kernel: None })
}

/// Whether a text can be the name of a probe set or a domain.
pub(super) fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
}

/// A probe set of the kernel; no file of a process provides it.
fn parse_kernel(text: &str, origin: &str, number: usize) -> Result<Plugin> {
    let number = u32::try_from(number).unwrap_or(u32::MAX);
    let parsed = super::kernel::parse(text, origin, number)?;
    let spec = ProbeSetSpec {
        kind: SetKind::Functions,
        number,
        name: parsed.plugin.spec.name.clone(),
        domain: "kernel".into(),
        prefixes: Vec::new(),
        functions: Vec::new(),
    };
    Ok(Plugin {
        spec,
        description: parsed.description,
        enabled: parsed.enabled,
        origin: origin.to_owned(),
        matching: Matching::nothing(),
        kernel: Some(parsed.plugin),
    })
}

/// What holds for tracepoints beyond what holds for functions.
fn check_tracepoint(spec: &FunctionSpec) -> Result<(), String> {
    let named = spec.symbol.split_once(':').is_some_and(|(provider, name)| !provider.is_empty() && !name.is_empty());
    if !named {
        return Err("a tracepoint is named provider:name".into());
    }
    if spec.is_return_probed() {
        return Err(
            "a tracepoint does not return: say which argument is the block, returns = { block_in_arg = N }".into()
        );
    }
    Ok(())
}

impl ManifestMatching {
    /// Any file that has all the tracepoints which are not optional.
    fn of_tracepoints(functions: &[Function]) -> Self {
        let required = functions.iter().filter(|f| !f.optional);
        let defines = required.flat_map(|f| f.symbol.iter().chain(&f.symbols).cloned()).collect();
        ManifestMatching { defines, prefixes: no_prefix(), ..ManifestMatching::default() }
    }

    fn check(self) -> Result<Matching, String> {
        if self.sonames.is_empty() && self.defines.is_empty() && self.exports.is_empty() {
            return Err("[match] names neither sonames nor defines nor exports, so nothing provides this set".into());
        }
        if self.prefixes.is_empty() {
            return Err("match.prefixes is empty: \"\" stands for the names as they are".into());
        }
        Ok(Matching {
            sonames: globs("match.sonames", &self.sonames)?,
            except: globs("match.except", &self.except)?,
            defines: self.defines,
            exports: self.exports,
            prefixes: self.prefixes,
            fallback: self.fallback,
        })
    }
}

pub(super) fn globs(key: &str, patterns: &[String]) -> Result<GlobSet, String> {
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        set.add(Glob::new(pattern).map_err(|e| format!("{key}: {e}"))?);
    }
    set.build().map_err(|e| format!("{key}: {e}"))
}

impl Function {
    /// The functions that this entry is about.
    fn named(&self) -> Result<Vec<&str>, String> {
        match (&self.symbol, self.symbols.as_slice()) {
            (Some(symbol), []) => Ok(vec![symbol]),
            (None, symbols @ [_, ..]) => Ok(symbols.iter().map(String::as_str).collect()),
            _ => Err("each [[function]] has a symbol or a list of symbols".into()),
        }
    }

    fn to_spec(&self, symbol: &str) -> Result<FunctionSpec, String> {
        let size = match self.size {
            None => Size::Constant(0),
            Some(ManifestSize { arg: Some(arg), times, constant: None }) => Size::Argument { arg, times },
            Some(ManifestSize { arg: None, times: None, constant: Some(bytes) }) => Size::Constant(bytes),
            Some(_) => return Err("size is { arg = N }, { arg = N, times = M } or { const = BYTES }".into()),
        };
        let returns = match self.returns {
            ManifestReturns { pointer_in_arg: Some(arg), ok, failed: None, in_place: false, block_in_arg: None } => {
                Returns::Pointer { arg, ok: ok.unwrap_or(0) }
            }
            ManifestReturns { pointer_in_arg: None, ok: None, failed, in_place: false, block_in_arg: None } => {
                Returns::Value { failed: failed.unwrap_or(0).cast_unsigned() }
            }
            ManifestReturns { pointer_in_arg: None, ok: None, failed: None, in_place, block_in_arg: None }
                if in_place =>
            {
                Returns::InPlace
            }
            ManifestReturns {
                pointer_in_arg: None,
                ok: None,
                failed: None,
                in_place: false,
                block_in_arg: Some(arg),
            } => Returns::AtEntry { arg },
            _ => {
                let forms = "{ failed = VALUE }, { pointer_in_arg = N, ok = VALUE }, { in_place = true }";
                return Err(format!("returns is one of {forms} and {{ block_in_arg = N }}"));
            }
        };
        let mut arguments = Vec::from_iter(self.old.map(|a| a.arg));
        if let Size::Argument { arg, times } = size {
            arguments.push(arg);
            arguments.extend(times);
        }
        if let Returns::Pointer { arg, .. } | Returns::AtEntry { arg } = returns {
            arguments.push(arg);
        }
        if let Some(n) = arguments.iter().find(|n| **n >= MAX_ARGUMENTS) {
            return Err(format!(
                "argument {n} cannot be read: arguments count from 0, and {MAX_ARGUMENTS} are in registers"
            ));
        }
        let role = match (self.role, self.old) {
            (ManifestRole::Alloc, None) => Role::Alloc,
            (ManifestRole::Alloc, Some(_)) => return Err("role \"alloc\" takes no old; is it a \"realloc\"?".into()),
            (ManifestRole::Realloc, Some(_)) => Role::Realloc,
            (ManifestRole::Free, Some(_)) => Role::Free,
            (_, None) => return Err("which argument is the old block? Say old = { arg = N }".into()),
        };
        if returns == Returns::InPlace && (role != Role::Realloc || !matches!(size, Size::Argument { .. })) {
            return Err("returns = { in_place = true } goes with role \"realloc\" and size = { arg = N }".into());
        }
        if matches!(returns, Returns::AtEntry { .. }) && role != Role::Alloc {
            return Err("returns = { block_in_arg = N } goes with role \"alloc\"".into());
        }
        if role == Role::Free && !self.range && self.size.is_some() {
            return Err("a free has a size only with range = true".into());
        }
        if self.range && (role != Role::Free || !matches!(size, Size::Argument { .. })) {
            return Err("range = true goes with role \"free\" and size = { arg = N }".into());
        }
        Ok(FunctionSpec {
            symbol: symbol.to_owned(),
            role,
            size,
            block_arg: self.old.map(|a| a.arg),
            returns,
            range: self.range,
            optional: self.optional,
        })
    }
}
