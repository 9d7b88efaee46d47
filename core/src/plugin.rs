//! Probe-set manifests: what a plugin is made of.
//!
//! A manifest is a TOML file that names the functions of an allocator (or of any pair of calls that acquire and
//! release something) and says what their arguments mean; see `plugins/README.md`. This module reads and checks
//! manifests, embedded ones and the user's, and turns them into what the kernel side wants. It attaches nothing.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use globset::{Glob, GlobSet, GlobSetBuilder};
use memleak_probes::{FunctionSpec, ProbeSetSpec, Returns, Role, Size};
use serde::Deserialize;

use crate::config::PluginSettings;
use crate::{Error, Result};

/// Manifests that come with the binary, by file name.
const EMBEDDED: [(&str, &str); 4] = [
    ("glibc.toml", include_str!("../../plugins/glibc.toml")),
    ("jemalloc.toml", include_str!("../../plugins/jemalloc.toml")),
    ("mmap.toml", include_str!("../../plugins/mmap.toml")),
    ("musl.toml", include_str!("../../plugins/musl.toml")),
];

/// Largest manifest that is read, bytes.
const MAX_MANIFEST: u64 = 1 << 20;
/// Arguments that can be read: those that the calling conventions pass in registers.
const MAX_ARGUMENTS: u8 = 6;

/// A probe set: which files provide it, and what its functions do.
#[derive(Clone, Debug)]
pub struct Plugin {
    /// What the kernel side needs; its number is the plugin's position in the list.
    pub spec: ProbeSetSpec,
    /// One line for people.
    pub description: String,
    /// Whether it runs.
    pub enabled: bool,
    /// Where the manifest came from.
    pub origin: String,
    sonames: GlobSet,
    executable_defines: Vec<String>,
}

impl Plugin {
    /// True when a mapped file of this path or `DT_SONAME` provides it.
    pub fn matches_library(&self, path: &str, soname: Option<&str>) -> bool {
        let file_name = path.rsplit('/').next().unwrap_or(path);
        self.sonames.is_match(file_name) || soname.is_some_and(|s| self.sonames.is_match(s))
    }

    /// Symbols that a statically linked executable must define, all of them, to provide it; empty when executables
    /// never do.
    pub fn executable_defines(&self) -> &[String] {
        &self.executable_defines
    }
}

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
    #[serde(rename = "match")]
    matching: Matching,
    #[serde(default, rename = "function")]
    functions: Vec<Function>,
}

fn yes() -> bool {
    true
}

fn memory() -> String {
    "memory".into()
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Userspace,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Matching {
    #[serde(default)]
    sonames: Vec<String>,
    #[serde(default)]
    executable_defines: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Function {
    symbol: String,
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
}

/// Reads the embedded manifests and those of `settings.dir`, in order of their file names.
///
/// A file of the folder wins over the embedded manifest of the same file name.
///
/// # Errors
/// The folder or a file cannot be read, a manifest is wrong, two have one name, or `[plugins.NAME]` names none.
pub fn load(settings: &PluginSettings) -> Result<Vec<Plugin>> {
    let mut sources: BTreeMap<String, (String, String)> = (EMBEDDED.iter())
        .map(|(file, text)| ((*file).to_owned(), (format!("built-in {file}"), (*text).to_owned())))
        .collect();
    if let Some(dir) = &settings.dir {
        for path in manifest_files(dir)? {
            let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            sources.insert(file, (path.display().to_string(), read_manifest(&path)?));
        }
    }
    let mut plugins: Vec<Plugin> = Vec::new();
    for (origin, text) in sources.values() {
        let plugin = parse(text, origin, plugins.len())?;
        if let Some(first) = plugins.iter().find(|p| p.spec.name == plugin.spec.name) {
            let message = format!("{origin}: the name \"{}\" is taken by {}", plugin.spec.name, first.origin);
            return Err(Error::config(message));
        }
        plugins.push(plugin);
    }
    for (name, enabled) in &settings.enabled {
        let Some(plugin) = plugins.iter_mut().find(|p| p.spec.name == *name) else {
            let known: Vec<&str> = plugins.iter().map(|p| p.spec.name.as_str()).collect();
            return Err(Error::config(format!("[plugins.{name}]: no such probe set; there are {}", known.join(", "))));
        };
        plugin.enabled = *enabled;
    }
    Ok(plugins)
}

fn manifest_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).map_err(|e| {
        Error::io(format!("failed to read the folder of probe sets {} (plugins.dir)", dir.display()), e)
    })?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| p.extension().is_some_and(|x| x == "toml"))
        .collect();
    files.sort();
    Ok(files)
}

fn read_manifest(path: &Path) -> Result<String> {
    let failed = |e| Error::io(format!("failed to read probe set {}", path.display()), e);
    let size = std::fs::metadata(path).map_err(failed)?.len();
    if size > MAX_MANIFEST {
        return Err(Error::config(format!(
            "{}: {size} bytes is no probe set (at most {MAX_MANIFEST})",
            path.display()
        )));
    }
    std::fs::read_to_string(path).map_err(failed)
}

/// Parses and checks one manifest.
fn parse(text: &str, origin: &str, number: usize) -> Result<Plugin> {
    let manifest: Manifest =
        toml::from_str(text).map_err(|e| Error::config(format!("{origin}: {}", e.to_string().trim_end())))?;
    let wrong = |what: String| Error::config(format!("{origin}: {what}"));
    let Manifest { name, kind: Kind::Userspace, description, enabled, domain, matching, functions } = manifest;
    let valid = |s: &str| !s.is_empty() && s.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    if !valid(&name) || !valid(&domain) {
        return Err(wrong("name and domain consist of letters, digits, - and _".into()));
    }
    if matching.sonames.is_empty() && matching.executable_defines.is_empty() {
        return Err(wrong("[match] names neither sonames nor executable_defines, so nothing provides this set".into()));
    }
    let mut sonames = GlobSetBuilder::new();
    for pattern in &matching.sonames {
        sonames.add(Glob::new(pattern).map_err(|e| wrong(format!("match.sonames: {e}")))?);
    }
    let sonames = sonames.build().map_err(|e| wrong(format!("match.sonames: {e}")))?;
    let mut seen = HashSet::new();
    let mut specs = Vec::new();
    for function in &functions {
        let at = |what: &str| wrong(format!("function {}: {what}", function.symbol));
        if !seen.insert(&function.symbol) {
            return Err(at("named twice"));
        }
        specs.push(function.to_spec().map_err(|what| at(&what))?);
    }
    for (role, verb) in [(Role::Alloc, "hands out a block"), (Role::Free, "takes a block back")] {
        let some = specs.iter().any(|f| f.role == role || f.role == Role::Realloc);
        if !some {
            return Err(wrong(format!("no function {verb}")));
        }
    }
    let spec = ProbeSetSpec { number: u32::try_from(number).unwrap_or(u32::MAX), name, domain, functions: specs };
    Ok(Plugin {
        spec,
        description,
        enabled,
        origin: origin.to_owned(),
        sonames,
        executable_defines: matching.executable_defines,
    })
}

impl Function {
    fn to_spec(&self) -> Result<FunctionSpec, String> {
        let size = match self.size {
            None => Size::Constant(0),
            Some(ManifestSize { arg: Some(arg), times, constant: None }) => Size::Argument { arg, times },
            Some(ManifestSize { arg: None, times: None, constant: Some(bytes) }) => Size::Constant(bytes),
            Some(_) => return Err("size is { arg = N }, { arg = N, times = M } or { const = BYTES }".into()),
        };
        let returns = match self.returns {
            ManifestReturns { pointer_in_arg: Some(arg), ok, failed: None } => {
                Returns::Pointer { arg, ok: ok.unwrap_or(0) }
            }
            ManifestReturns { pointer_in_arg: None, ok: None, failed } => {
                Returns::Value { failed: failed.unwrap_or(0).cast_unsigned() }
            }
            _ => return Err("returns is { failed = VALUE } or { pointer_in_arg = N, ok = VALUE }".into()),
        };
        let mut arguments = Vec::from_iter(self.old.map(|a| a.arg));
        if let Size::Argument { arg, times } = size {
            arguments.push(arg);
            arguments.extend(times);
        }
        if let Returns::Pointer { arg, .. } = returns {
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
        if role == Role::Free && !self.range && self.size.is_some() {
            return Err("a free has a size only with range = true".into());
        }
        if self.range && (role != Role::Free || !matches!(size, Size::Argument { .. })) {
            return Err("range = true goes with role \"free\" and size = { arg = N }".into());
        }
        Ok(FunctionSpec {
            symbol: self.symbol.clone(),
            role,
            size,
            block_arg: self.old.map(|a| a.arg),
            returns,
            range: self.range,
            optional: self.optional,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POOL: &str = r#"
        name = "pool"
        kind = "userspace"
        [match]
        sonames = ["libpool.so*"]
        [[function]]
        symbol = "pool_get"
        role = "alloc"
        size = { const = 24 }
        [[function]]
        symbol = "pool_put"
        role = "free"
        old = { arg = 1 }
    "#;

    fn error(text: &str) -> String {
        parse(text, "pool.toml", 0).unwrap_err().to_string()
    }

    /// The shipped manifests are what most users rely on.
    #[test]
    fn embedded_manifests_are_valid_and_mmap_is_off() {
        let plugins = load(&PluginSettings::default()).unwrap();
        let on: Vec<(&str, bool)> = plugins.iter().map(|p| (p.spec.name.as_str(), p.enabled)).collect();
        assert_eq!(on, [("glibc", true), ("jemalloc", true), ("mmap", false), ("musl", true)]);
    }

    /// A set of the user's own needs nothing but a manifest.
    #[test]
    fn a_manifest_says_roles_and_arguments() {
        let plugin = parse(POOL, "pool.toml", 3).unwrap();
        assert_eq!(plugin.spec.number, 3);
        assert_eq!(plugin.spec.domain, "memory");
        assert_eq!(plugin.spec.functions[0].size, Size::Constant(24));
        assert_eq!(plugin.spec.functions[1].block_arg, Some(1));
        assert!(plugin.matches_library("/usr/lib/libpool.so.2", None));
        assert!(plugin.matches_library("/app/renamed", Some("libpool.so.1")));
        assert!(!plugin.matches_library("/usr/lib/libc.so.6", None));
    }

    /// Every mistake is named with the file and the function.
    #[test]
    fn mistakes_are_named() {
        assert!(error(&POOL.replace("pool_put", "pool_get")).contains("function pool_get: named twice"));
        assert!(error(&POOL.replace("arg = 1", "arg = 6")).contains("argument 6 cannot be read"));
        assert!(error(&POOL.replace("role = \"free\"", "role = \"alloc\"")).contains("is it a \"realloc\"?"));
        assert!(error(&POOL.replace("const = 24", "const = 24, arg = 1")).contains("size is {"));
        assert!(error(&POOL.replace("libpool.so*", "lib[")).contains("match.sonames"));
        let unknown = error(&POOL.replace("symbol = \"pool_get\"", "symbole = \"pool_get\""));
        assert!(unknown.contains("line 7") && unknown.contains("symbole"), "{unknown}");
        assert!(
            error("name = \"x\"\nkind = \"userspace\"\n[match]\nsonames = [\"a\"]").contains("no function hands out")
        );
    }

    /// Switching on what does not exist is a mistake, not a wish.
    #[test]
    fn an_unknown_set_in_the_settings_is_an_error() {
        let settings = PluginSettings { enabled: [("jemaloc".to_owned(), true)].into(), ..PluginSettings::default() };
        assert!(load(&settings).unwrap_err().to_string().contains("there are glibc, jemalloc, mmap, musl"));
    }
}
