//! The template environment: what is embedded in the binary, and what a user's folder puts in its place.
//!
//! A template's name decides how values are escaped in it: `*.html.tera` escapes HTML, `*.json.tera` escapes for the
//! inside of a JSON string, everything else is plain text, in which control characters are written out. A user's
//! file of the same name wins over the embedded one. Style sheets and scripts (`*.css`, `*.js`) are looked up the
//! same way and put into a page with `{{ asset(name="report.css") }}`, so that a page needs no other file.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use tera::{Context, Tera, Value};

use super::filters;
use super::text::visible;
use crate::error::{Error, ErrorKind, Result};

/// Templates in the binary, by name.
const EMBEDDED: [(&str, &str); 7] = [
    ("alert.txt.tera", include_str!("../../../templates/alert.txt.tera")),
    ("alert.webhook.json.tera", include_str!("../../../templates/alert.webhook.json.tera")),
    ("report.html.tera", include_str!("../../../templates/report.html.tera")),
    ("report.txt.tera", include_str!("../../../templates/report.txt.tera")),
    ("_collector.html.tera", include_str!("../../../templates/_collector.html.tera")),
    ("_guide.html.tera", include_str!("../../../templates/_guide.html.tera")),
    ("_sites.txt.tera", include_str!("../../../templates/_sites.txt.tera")),
];

/// Style sheets and scripts in the binary, by name.
const EMBEDDED_ASSETS: [(&str, &str); 7] = [
    ("report.css", include_str!("../../../templates/report.css")),
    ("report_data.js", include_str!("../../../templates/report_data.js")),
    ("report_charts.js", include_str!("../../../templates/report_charts.js")),
    ("report_detail.js", include_str!("../../../templates/report_detail.js")),
    ("report.js", include_str!("../../../templates/report.js")),
    ("uPlot.min.css", include_str!("../../../templates/vendor/uplot/uPlot.min.css")),
    ("uPlot.iife.min.js", include_str!("../../../templates/vendor/uplot/uPlot.iife.min.js")),
];

/// How values are escaped in a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    Html,
    Json,
    Text,
}

impl Escape {
    fn of(name: &str) -> Escape {
        match name.strip_suffix(".tera").unwrap_or(name) {
            n if n.ends_with(".html") || n.ends_with(".htm") => Escape::Html,
            n if n.ends_with(".json") => Escape::Json,
            _ => Escape::Text,
        }
    }

    fn function(self) -> fn(&str) -> String {
        match self {
            Escape::Html => |s| tera::escape_html(&visible(s)),
            Escape::Json => escape_json,
            Escape::Text => |s| visible(s).into_owned(),
        }
    }
}

/// The inside of a JSON string.
fn escape_json(text: &str) -> String {
    let quoted = Value::String(text.to_owned()).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}

/// All templates, ready to render. Immutable and cheap to share.
#[derive(Debug)]
pub struct Templates {
    /// The same templates once per way of escaping: tera has one escape function per environment.
    html: Tera,
    json: Tera,
    text: Tera,
    /// Where a user's template was read from, by name; for messages.
    files: BTreeMap<String, PathBuf>,
}

impl Templates {
    /// The embedded templates, and those of `dir` in their place.
    ///
    /// # Errors
    /// The folder cannot be read, or a template in it is broken; with several broken ones, the first (see
    /// [`Templates::check`]).
    pub fn new(dir: Option<&Path>) -> Result<Templates> {
        let (templates, problems) = Templates::load(dir);
        match problems.into_iter().next() {
            Some(problem) => Err(problem),
            None => Ok(templates),
        }
    }

    /// Everything that is wrong with the templates of `dir`; empty when nothing is. Templates of the report and
    /// of alerts are also rendered once with a small sample, which finds unknown fields and filters.
    pub fn check(dir: Option<&Path>) -> Vec<Error> {
        let (templates, mut problems) = Templates::load(dir);
        if problems.is_empty() {
            problems.extend(super::report::check_templates(&templates));
            problems.extend(super::alerts::check_templates(&templates));
        }
        problems
    }

    /// Loads as much as can be loaded.
    fn load(dir: Option<&Path>) -> (Templates, Vec<Error>) {
        let mut problems = Vec::new();
        let mut sources: BTreeMap<String, Cow<'static, str>> =
            EMBEDDED.iter().map(|(name, text)| ((*name).to_owned(), Cow::Borrowed(*text))).collect();
        let mut assets: HashMap<String, Cow<'static, str>> =
            EMBEDDED_ASSETS.iter().map(|(name, text)| ((*name).to_owned(), Cow::Borrowed(*text))).collect();
        let mut files = BTreeMap::new();
        if let Some(dir) = dir {
            for file in read_folder(dir) {
                match file.and_then(read_file) {
                    Ok((name, path, text)) if name.ends_with(".tera") => {
                        sources.insert(name.clone(), Cow::Owned(text));
                        files.insert(name, path);
                    }
                    Ok((name, path, text)) => match asset_problem(&text) {
                        None => drop(assets.insert(name, Cow::Owned(text))),
                        Some(why) => problems.push(Error::new(ErrorKind::Template, format!("{}: {why}", shown(&path)))),
                    },
                    Err(e) => problems.push(e),
                }
            }
        }
        let mut base = Tera::default();
        filters::register(&mut base);
        base.register_function("asset", Asset(Arc::new(assets)));
        problems.extend(add(&mut base, &sources, &files));
        let environment = |escape: Escape| {
            let mut tera = base.clone();
            // Every name ends with the empty suffix: escape in all of them.
            tera.autoescape_on(vec![""]);
            tera.set_escape_fn(escape.function());
            tera
        };
        let mut json = environment(Escape::Json);
        // Output of tera's own filter is complete JSON; escaped once more it would be wrong.
        json.register_filter("json_encode", filters::Json);
        let templates = Templates { html: environment(Escape::Html), json, text: environment(Escape::Text), files };
        (templates, problems)
    }

    /// True when there is a template of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.text.get_template(name).is_ok()
    }

    /// Renders the template `name` (a file name, such as `report.txt.tera`) with the fields of `context`.
    ///
    /// # Errors
    /// No such template, a context that is no object, or an error in the template; the message names the template.
    pub fn render(&self, name: &str, context: &impl Serialize) -> Result<String> {
        self.render_for(name, "", context)
    }

    /// As [`Templates::render`]; an error also names the subject that was to be rendered, such as `alert 9f02…`.
    pub fn render_for(&self, name: &str, subject: &str, context: &impl Serialize) -> Result<String> {
        let fail = |cause: String| {
            let of = if subject.is_empty() { String::new() } else { format!(" for {}", visible(subject)) };
            Error::with_source(ErrorKind::Template, format!("failed to render {}{of}", self.origin(name)), cause)
        };
        if !self.contains(name) {
            let known: Vec<&str> = self.text.get_template_names().filter(|n| !n.starts_with('_')).collect();
            return Err(fail(format!("no such template; there are {}", known.join(", "))));
        }
        let context = Context::from_serialize(context).map_err(|e| fail(chain(&e)))?;
        let tera = match Escape::of(name) {
            Escape::Html => &self.html,
            Escape::Json => &self.json,
            Escape::Text => &self.text,
        };
        tera.render(name, &context).map_err(|e| fail(chain(&e)))
    }

    /// Where a template comes from, for messages.
    fn origin(&self, name: &str) -> String {
        match self.files.get(name) {
            Some(path) => format!("template {}", shown(path)),
            None => format!("template {}", visible(name)),
        }
    }
}

/// Parses every template; what fails to parse is left out and returned as a problem.
fn add(
    tera: &mut Tera,
    sources: &BTreeMap<String, Cow<'static, str>>,
    files: &BTreeMap<String, PathBuf>,
) -> Vec<Error> {
    let mut problems = Vec::new();
    let mut good = Vec::new();
    for (name, text) in sources {
        // Alone first: tera reports only the first problem of a set, and we want them all.
        match tera::Template::new(name, None, text) {
            Ok(_) => good.push((name.as_str(), text.as_ref())),
            Err(e) => problems.push(parse_error(name, files.get(name), &e)),
        }
    }
    // What is left to go wrong together: a parent or a macro file that is missing.
    if let Err(e) = tera.add_raw_templates(good) {
        problems.push(Error::with_source(ErrorKind::Template, "failed to connect the templates", chain(&e)));
    }
    problems
}

/// A parse error as `FILE:LINE:COLUMN: cause`, the form that editors jump to.
fn parse_error(name: &str, file: Option<&PathBuf>, error: &tera::Error) -> Error {
    let text = chain(error);
    let place = text.split_once("--> ").and_then(|(_, rest)| rest.split_whitespace().next()).unwrap_or("1:1");
    let cause = text.rsplit_once("= ").map_or(text.as_str(), |(_, cause)| cause).trim();
    let file = file.map_or_else(|| format!("embedded template {name}"), |p| shown(p));
    Error::new(ErrorKind::Template, format!("{file}:{place}: {cause}"))
}

/// The files of a folder that are templates, style sheets or scripts, by name. Hidden files are left out: editors
/// keep their backups there.
fn read_folder(dir: &Path) -> Vec<Result<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) => return vec![Err(Error::io(format!("failed to read the template folder {}", shown(dir)), e))],
    };
    let wanted = |path: &PathBuf| {
        let name = path.file_name().map(|n| n.to_string_lossy()).unwrap_or_default();
        !name.starts_with('.') && [".tera", ".css", ".js"].iter().any(|s| name.ends_with(s)) && !path.is_dir()
    };
    let mut paths = Vec::new();
    let mut problems = Vec::new();
    for entry in entries {
        match entry {
            Ok(entry) if wanted(&entry.path()) => paths.push(entry.path()),
            Ok(_) => {}
            Err(e) => {
                problems.push(Err(Error::io(format!("failed to read the template folder {}", shown(dir)), e)));
            }
        }
    }
    paths.sort();
    problems.extend(paths.into_iter().map(Ok));
    problems
}

/// Name, path and text of a file.
fn read_file(path: PathBuf) -> Result<(String, PathBuf, String)> {
    let fail = |e| Error::io(format!("failed to read the template {}", shown(&path)), e);
    let text = std::fs::read_to_string(&path).map_err(fail)?;
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    Ok((name, path, text))
}

/// Why a style sheet or script cannot be put into a page.
fn asset_problem(text: &str) -> Option<&'static str> {
    let lower = text.to_ascii_lowercase();
    ["</script", "</style", "<!--"].iter().any(|end| lower.contains(end)).then_some(
        "holds `</script`, `</style` or `<!--`, which would end the element it is put into; write `<\\/script`",
    )
}

/// The template function `asset(name="…")`.
#[derive(Clone)]
struct Asset(Arc<HashMap<String, Cow<'static, str>>>);

impl tera::Function for Asset {
    fn call(&self, args: &HashMap<String, Value>) -> tera::Result<Value> {
        let name = args.get("name").and_then(Value::as_str);
        let name = name.ok_or_else(|| tera::Error::msg("function `asset` needs name=\"FILE\""))?;
        match self.0.get(name) {
            Some(text) => Ok(Value::String(text.to_string())),
            None => Err(tera::Error::msg(format!("there is no style sheet or script {name:?}"))),
        }
    }

    /// Assets come from the binary or the user's own folder, never from a target.
    fn is_safe(&self) -> bool {
        true
    }
}

/// An error and its causes on one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(e) = source {
        // Writing to a string cannot fail.
        let _ = write!(text, ": {e}");
        source = e.source();
    }
    text
}

/// A path for messages.
fn shown(path: &Path) -> String {
    visible(&path.to_string_lossy()).into_owned()
}
