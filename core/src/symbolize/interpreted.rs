//! Puts the calls of an interpreted language where the interpreter is in a stack of C functions.

use super::Frame;
use crate::python::PythonCall;

/// The function of CPython that executes functions; each call of it executes Python functions up to one that C code called.
const EVALUATOR: &str = "_PyEval_EvalFrameDefault";

/// `native` with the Python calls in front of the interpreter's frame that executes them, innermost first. They share its
/// place in memory, as inlined calls do.
pub(super) fn merge(native: Vec<Frame>, calls: &[PythonCall]) -> Vec<Frame> {
    let mut out = Vec::with_capacity(native.len() + calls.len());
    let mut rest = calls.iter();
    let evaluators = native.iter().filter(|f| is_evaluator(f)).count();
    let mut seen = 0;
    for frame in native {
        if is_evaluator(&frame) {
            seen += 1;
            for call in rest.by_ref() {
                out.push(interpreted(call, &frame));
                // Should the stacks not agree, nothing is left out.
                if call.is_entry && seen < evaluators {
                    break;
                }
            }
        }
        out.push(frame);
    }
    // The C stack ended before the interpreter was reached.
    if let Some(last) = out.last().cloned() {
        out.extend(rest.map(|call| Frame { inlined: false, ..interpreted(call, &last) }));
    }
    out
}

fn is_evaluator(frame: &Frame) -> bool {
    // A part that the compiler has split off has a suffix.
    !frame.inlined && frame.function.as_deref().is_some_and(|name| name.starts_with(EVALUATOR))
}

fn interpreted(call: &PythonCall, by: &Frame) -> Frame {
    Frame {
        function: Some(call.function.to_string()),
        file: Some(call.file.to_string()),
        line: call.line.or(Some(call.first_line)).filter(|line| *line > 0),
        inlined: true,
        reason: None,
        ..by.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn native(name: &str) -> Frame {
        Frame { function: Some(name.to_owned()), module: Some("/usr/bin/python3".to_owned()), ..Frame::default() }
    }

    fn call(name: &str, is_entry: bool) -> PythonCall {
        PythonCall { function: name.into(), file: "app.py".into(), first_line: 3, line: Some(7), is_entry }
    }

    fn names(frames: &[Frame]) -> Vec<&str> {
        frames.iter().filter_map(|f| f.function.as_deref()).collect()
    }

    /// C code that Python called, and that calls Python again, stands between the two.
    #[test]
    fn each_call_of_the_interpreter_has_its_functions() {
        let stack = ["malloc_wrapper", "_PyEval_EvalFrameDefault", "sort", "_PyEval_EvalFrameDefault.cold", "main"];
        let calls = [call("key", true), call("inner", false), call("<module>", true)];
        let merged = merge(stack.iter().map(|n| native(n)).collect(), &calls);
        let expected = ["malloc_wrapper", "key", stack[1], "sort", "inner", "<module>", stack[3], "main"];
        assert_eq!(names(&merged), expected);
        assert!(merged[1].inlined && merged[1].line == Some(7) && merged[1].file.as_deref() == Some("app.py"));
    }

    /// Whatever the target says of itself, no call disappears and no frame is left out.
    #[test]
    fn stacks_that_do_not_agree_lose_nothing() {
        let calls = [call("a", true), call("b", true), call("c", false)];
        let one = merge(vec![native("x"), native(EVALUATOR), native("main")], &calls);
        assert_eq!(names(&one), ["x", "a", "b", "c", EVALUATOR, "main"]);
        assert_eq!(names(&merge(vec![native("x")], &calls)), ["x", "a", "b", "c"]);
        assert_eq!(names(&merge(Vec::new(), &calls)), [""; 0]);
        let two = merge(vec![native(EVALUATOR), native(EVALUATOR)], &calls[..1]);
        assert_eq!(names(&two), ["a", EVALUATOR, EVALUATOR]);
    }
}
