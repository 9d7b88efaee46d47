//! Which mapped files provide a probe set.
//!
//! Decides from a file's names and the symbols that it has; reads no file. Two ways to be found: the name of a library
//! says that it is a known allocator, or the symbols say so (an allocator linked into a program or into another
//! library, or one that nobody knows but which takes malloc over).

use std::collections::HashSet;

use globset::GlobSet;

/// What is known of a mapped file.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// `DT_SONAME`; `None` when it has none.
    pub soname: Option<String>,
    /// Those of the names that any probe set asks for ([`Matching::names`]) that are functions of the file.
    pub defined: HashSet<String>,
    /// Those of them that other files can use.
    pub exported: HashSet<String>,
}

/// The `[match]` table of a manifest.
#[derive(Clone, Debug)]
pub struct Matching {
    /// Names of libraries that provide the set.
    pub(super) sonames: GlobSet,
    /// Names of files that never do.
    pub(super) except: GlobSet,
    /// A file that has all of these functions provides it.
    pub(super) defines: Vec<String>,
    /// A file that exports all of these functions provides it.
    pub(super) exports: Vec<String>,
    /// What the names of functions may begin with in a file, in addition.
    pub(super) prefixes: Vec<String>,
    /// Only for files that no other set of the domain fits.
    pub(super) fallback: bool,
}

impl Matching {
    /// No file provides the set.
    pub(super) fn nothing() -> Self {
        Matching {
            sonames: GlobSet::empty(),
            except: GlobSet::empty(),
            defines: Vec::new(),
            exports: Vec::new(),
            prefixes: Vec::new(),
            fallback: false,
        }
    }

    /// True when a file of this path provides the set.
    pub fn fits(&self, path: &str, facts: &Facts) -> bool {
        let file_name = path.rsplit('/').next().unwrap_or(path);
        let named = |globs: &GlobSet| {
            globs.is_match(file_name) || facts.soname.as_deref().is_some_and(|soname| globs.is_match(soname))
        };
        let has_all = |names: &[String], of: &HashSet<String>| {
            let under = |prefix: &String| names.iter().all(|n| of.contains(&format!("{prefix}{n}")));
            !names.is_empty() && self.prefixes.iter().any(under)
        };
        let fits = named(&self.sonames) || has_all(&self.defines, &facts.defined);
        (fits || has_all(&self.exports, &facts.exported)) && !named(&self.except)
    }

    /// True for a set that takes only what no other set of its domain takes.
    pub fn is_fallback(&self) -> bool {
        self.fallback
    }

    /// The function names that decide, as they may be in a file.
    pub fn names(&self) -> impl Iterator<Item = String> {
        let names = || self.defines.iter().chain(&self.exports);
        self.prefixes.iter().flat_map(move |p| names().map(move |n| format!("{p}{n}")))
    }
}

#[cfg(test)]
mod tests {
    use globset::{Glob, GlobSetBuilder};

    use super::*;

    fn globs(patterns: &[&str]) -> GlobSet {
        let mut set = GlobSetBuilder::new();
        for pattern in patterns {
            set.add(Glob::new(pattern).unwrap());
        }
        set.build().unwrap()
    }

    fn matching() -> Matching {
        Matching {
            sonames: globs(&["libpool.so*"]),
            except: globs(&["ld-*"]),
            defines: vec!["pool_get".into(), "pool_put".into()],
            exports: vec!["take".into()],
            prefixes: vec![String::new(), "my_".into()],
            fallback: false,
        }
    }

    fn facts(defined: &[&str], exported: &[&str]) -> Facts {
        let set = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        Facts { soname: None, defined: set(defined), exported: set(exported) }
    }

    /// A library is found by its file name and, renamed, by its own name for itself.
    #[test]
    fn a_library_is_found_by_either_name() {
        let none = facts(&[], &[]);
        assert!(matching().fits("/usr/lib/libpool.so.2", &none));
        assert!(!matching().fits("/usr/lib/libc.so.6", &none));
        let renamed = Facts { soname: Some("libpool.so.1".into()), ..none };
        assert!(matching().fits("/app/renamed", &renamed));
    }

    /// Half of an allocator under one prefix and half under another is none.
    #[test]
    fn symbols_count_when_all_are_there_under_one_prefix() {
        assert!(matching().fits("/app/program", &facts(&["pool_get", "pool_put"], &[])));
        assert!(matching().fits("/app/program", &facts(&["my_pool_get", "my_pool_put"], &[])));
        assert!(!matching().fits("/app/program", &facts(&["pool_get"], &[])));
        assert!(!matching().fits("/app/program", &facts(&["pool_get", "my_pool_put"], &[])));
    }

    /// A function that only the file itself can call takes nothing over.
    #[test]
    fn what_must_be_exported_does_not_count_when_it_is_only_defined() {
        assert!(matching().fits("/app/program", &facts(&["take"], &["take"])));
        assert!(!matching().fits("/app/program", &facts(&["take"], &[])));
    }

    /// The exceptions win.
    #[test]
    fn an_excepted_file_provides_nothing() {
        assert!(!matching().fits("/lib/ld-2.31.so", &facts(&["take"], &["take"])));
    }

    /// What is looked for in files are all names with all prefixes.
    #[test]
    fn names_come_with_every_prefix() {
        let names: Vec<String> = matching().names().collect();
        assert_eq!(names, ["pool_get", "pool_put", "take", "my_pool_get", "my_pool_put", "my_take"]);
    }
}
