//! Manifests of probe sets of the kernel (`kind = "kernel"`).

use globset::GlobSet;
use memleak_probes::kernel::{
    KernelDomain, KernelFunction, KernelRole, KernelSetSpec, KernelTracepoint, is_known_tracepoint,
};
use serde::Deserialize;

use super::manifest::globs;
use crate::{Error, Result};

/// The file format.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    name: String,
    #[serde(rename = "kind")]
    _kind: super::manifest::Kind,
    #[serde(default)]
    description: String,
    #[serde(default = "super::manifest::yes")]
    enabled: bool,
    memory: Memory,
    #[serde(default)]
    wrappers: Vec<String>,
    #[serde(default)]
    inner: Vec<String>,
    #[serde(default, rename = "tracepoint")]
    tracepoints: Vec<Tracepoint>,
    #[serde(default, rename = "function")]
    functions: Vec<Function>,
}

/// What the blocks of a set are.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Memory {
    Slab,
    Pages,
    Percpu,
    Vmalloc,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Function {
    symbols: Vec<String>,
    role: Role,
    #[serde(default)]
    optional: bool,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Role {
    Alloc,
    Free,
    FreeBulk,
    FreeRcu,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tracepoint {
    name: String,
    #[serde(default)]
    optional: bool,
}

/// What a probe set of the kernel is made of.
#[derive(Clone, Debug)]
pub struct KernelPlugin {
    /// What is attached.
    pub spec: KernelSetSpec,
    /// Functions that only pass on what an allocator gives them: the first other frame is the one that allocates.
    pub wrappers: GlobSet,
    /// Functions below which allocations count elsewhere.
    pub inner: GlobSet,
}

/// Parsed manifest: name, description, whether it runs, and what it is made of.
pub(super) struct Parsed {
    pub(super) description: String,
    pub(super) enabled: bool,
    pub(super) plugin: KernelPlugin,
}

/// Parses and checks a manifest of the kernel.
pub(super) fn parse(text: &str, origin: &str, number: u32) -> Result<Parsed> {
    let manifest: Manifest =
        toml::from_str(text).map_err(|e| Error::config(format!("{origin}: {}", e.to_string().trim_end())))?;
    let wrong = |what: String| Error::config(format!("{origin}: {what}"));
    if !super::manifest::is_name(&manifest.name) {
        return Err(wrong("name consists of letters, digits, - and _".into()));
    }
    if let Some(unknown) = manifest.tracepoints.iter().find(|t| !is_known_tracepoint(&t.name)) {
        return Err(wrong(format!("tracepoint {}: memleak has no program for it", unknown.name)));
    }
    if manifest.tracepoints.is_empty() && manifest.functions.is_empty() {
        return Err(wrong("names neither a [[tracepoint]] nor a [[function]]".into()));
    }
    if manifest.functions.iter().any(|f| f.symbols.is_empty()) {
        return Err(wrong("each [[function]] has a list of symbols".into()));
    }
    let functions = manifest.functions.into_iter().map(|f| KernelFunction {
        symbols: f.symbols,
        role: match f.role {
            Role::Alloc => KernelRole::Alloc,
            Role::Free => KernelRole::Free,
            Role::FreeBulk => KernelRole::FreeBulk,
            Role::FreeRcu => KernelRole::FreeRcu,
        },
        optional: f.optional,
    });
    let domain = match manifest.memory {
        Memory::Slab => KernelDomain::Slab,
        Memory::Pages => KernelDomain::Pages,
        Memory::Percpu => KernelDomain::Percpu,
        Memory::Vmalloc => KernelDomain::Vmalloc,
    };
    let tracepoints =
        manifest.tracepoints.into_iter().map(|t| KernelTracepoint { name: t.name, optional: t.optional }).collect();
    Ok(Parsed {
        description: manifest.description,
        enabled: manifest.enabled,
        plugin: KernelPlugin {
            wrappers: globs("wrappers", &manifest.wrappers).map_err(&wrong)?,
            inner: globs("inner", &manifest.inner).map_err(&wrong)?,
            spec: KernelSetSpec { number, name: manifest.name, domain, tracepoints, functions: functions.collect() },
        },
    })
}
