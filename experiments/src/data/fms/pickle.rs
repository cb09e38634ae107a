//! What `torch.save` wrote, as plain values: numbers, texts, lists and dictionaries. Nothing is ever called: an object of a known harmless kind
//! (tensors, ordered dictionaries) becomes [`Value::Opaque`], any other is refused by name, and no input makes it panic or recurse.

use crate::data::DataError;
use crate::data::mmap::Mapped;
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

/// A value of Python.
#[derive(Clone, Debug)]
pub enum Value {
    /// `None`.
    None,
    /// `True`, `False`.
    Bool(bool),
    /// An integer that fits 64 bits.
    Int(i64),
    /// A float.
    Float(f64),
    /// A text.
    Text(Rc<str>),
    /// A list or tuple.
    List(Rc<RefCell<Vec<Value>>>),
    /// A dictionary, in order.
    Dict(Rc<RefCell<Vec<(Value, Value)>>>),
    /// An object whose contents are of no interest, by the name of its class.
    Opaque(Rc<str>),
}

impl Value {
    /// The value of a text key.
    pub fn get(&self, key: &str) -> Option<Value> {
        let Self::Dict(pairs) = self else {
            return None;
        };
        let pairs = pairs.borrow();
        let found = pairs
            .iter()
            .rev()
            .find(|(k, _)| matches!(k, Self::Text(t) if &**t == key));
        found.map(|(_, v)| v.clone())
    }

    /// The items of a list.
    pub fn items(&self) -> Option<Vec<Value>> {
        match self {
            Self::List(items) => Some(items.borrow().clone()),
            _ => None,
        }
    }

    /// An integer.
    pub fn int(&self) -> Option<i64> {
        match self {
            Self::Int(n) => Some(*n),
            _ => None,
        }
    }

    /// A text.
    pub fn text(&self) -> Option<String> {
        match self {
            Self::Text(t) => Some(t.to_string()),
            _ => None,
        }
    }

    /// What it is, for people.
    pub fn kind(&self) -> &str {
        match self {
            Self::None => "None",
            Self::Bool(_) => "a truth value",
            Self::Int(_) => "a whole number",
            Self::Float(_) => "a number",
            Self::Text(_) => "a text",
            Self::List(_) => "a list",
            Self::Dict(_) => "a dictionary",
            Self::Opaque(name) => name,
        }
    }
}

/// Reads a file of `torch.save` (PyTorch 1.6 and later).
///
/// # Errors
/// [`DataError::Io`]; [`DataError::Damaged`] for what is no such file, is cut short, or would call something.
pub fn read_torch(path: &Path) -> Result<Value, DataError> {
    let map = Mapped::open(path)?;
    let damaged = |(offset, what): (usize, String)| DataError::Damaged {
        path: path.into(),
        offset: offset as u64,
        what,
    };
    let (start, bytes) = member(&map, "data.pkl").map_err(damaged)?;
    load(bytes).map_err(|(at, what)| damaged((start + at, what)))
}

type Found<T> = Result<T, (usize, String)>;

fn u16_at(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_le_bytes(
        bytes.get(at..at + 2)?.try_into().ok()?,
    )))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?)).ok()
}

/// Offset and bytes of the stored member of a zip archive whose name ends in `/name`.
fn member<'a>(zip: &'a [u8], name: &str) -> Found<(usize, &'a [u8])> {
    let cut = |at: usize| {
        (at, "no zip archive, or one cut short; expected a file of torch.save (PyTorch 1.6 or later)".to_owned())
    };
    // The end record is 22 bytes and a comment of at most 65,535.
    let tail = zip.len().saturating_sub(22 + 0xffff);
    let end = (tail..=zip.len().saturating_sub(22))
        .rev()
        .find(|&at| zip[at..].starts_with(b"PK\x05\x06"))
        .ok_or_else(|| cut(zip.len()))?;
    let mut at = u32_at(zip, end + 16).ok_or_else(|| cut(end))?;
    while at < end && zip[at..].starts_with(b"PK\x01\x02") {
        let header = || -> Option<_> {
            let (method, size) = (u16_at(zip, at + 10)?, u32_at(zip, at + 20)?);
            let (n, extra, comment) = (
                u16_at(zip, at + 28)?,
                u16_at(zip, at + 30)?,
                u16_at(zip, at + 32)?,
            );
            let local = u32_at(zip, at + 42)?;
            let entry = zip.get(at + 46..at + 46 + n)?;
            Some((method, size, entry, local, at + 46 + n + extra + comment))
        };
        let (method, size, entry, local, next) = header().ok_or_else(|| cut(at))?;
        let is_it = entry
            .strip_suffix(name.as_bytes())
            .is_some_and(|rest| rest.is_empty() || rest.ends_with(b"/"));
        if is_it {
            if method != 0 {
                return Err((
                    at,
                    format!("{name} is compressed; torch.save stores it as it is"),
                ));
            }
            let skip = u16_at(zip, local + 26).zip(u16_at(zip, local + 28));
            let start = skip
                .map(|(n, extra)| local + 30 + n + extra)
                .ok_or_else(|| cut(local))?;
            let bytes = zip
                .get(start..)
                .and_then(|z| z.get(..size))
                .ok_or_else(|| cut(start))?;
            return Ok((start, bytes));
        }
        at = next;
    }
    Err((
        end,
        format!("no {name} in the archive; expected a file of torch.save"),
    ))
}

/// Classes and functions that a loader state may name; all become opaque.
const HARMLESS: [&str; 12] = [
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch ByteStorage",
    "torch ByteTensor",
    "torch CharStorage",
    "torch IntStorage",
    "torch LongStorage",
    "torch FloatStorage",
    "torch DoubleStorage",
    "torch BoolStorage",
    "torch.storage UntypedStorage",
    "torch.storage TypedStorage",
];

/// The machine that pickles are programs for.
struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    /// Stack heights at `MARK`s.
    marks: Vec<usize>,
    memo: Vec<Option<Value>>,
}

fn load(bytes: &[u8]) -> Found<Value> {
    let mut machine = Machine {
        bytes,
        at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: Vec::new(),
    };
    loop {
        let begin = machine.at;
        match machine.step() {
            Ok(None) => {}
            Ok(Some(value)) => return Ok(value),
            Err(what) => return Err((begin, what)),
        }
    }
}

impl<'a> Machine<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(n);
        let bytes = end
            .and_then(|end| self.bytes.get(self.at..end))
            .ok_or("the pickle is cut short")?;
        self.at += n;
        Ok(bytes)
    }

    fn byte(&mut self) -> Result<usize, String> {
        Ok(usize::from(self.take(1)?[0]))
    }

    fn long(&mut self) -> Result<usize, String> {
        let bytes = self.take(4)?;
        u32_at(bytes, 0).ok_or_else(|| "a length".into())
    }

    fn line(&mut self) -> Result<String, String> {
        let rest = &self.bytes[self.at.min(self.bytes.len())..];
        let n = rest
            .iter()
            .position(|&b| b == b'\n')
            .ok_or("the pickle is cut short")?;
        let line = String::from_utf8_lossy(self.take(n)?).into_owned();
        self.at += 1;
        Ok(line)
    }

    fn text(&mut self, n: usize) -> Result<Value, String> {
        let text = std::str::from_utf8(self.take(n)?).map_err(|e| e.to_string())?;
        Ok(Value::Text(text.into()))
    }

    fn pop(&mut self) -> Result<Value, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("the pickle takes more than it made".into());
        }
        self.stack.pop().ok_or_else(|| "an empty stack".into())
    }

    fn pop_n(&mut self, n: usize) -> Result<Vec<Value>, String> {
        let mut items = (0..n).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
        items.reverse();
        Ok(items)
    }

    fn pop_mark(&mut self) -> Result<Vec<Value>, String> {
        let mark = self
            .marks
            .pop()
            .ok_or("the pickle ends what it did not begin")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn remember(&mut self, i: usize) -> Result<(), String> {
        // Numbers are given in order; one far ahead would only take memory.
        if i > self.memo.len() + 1024 {
            return Err(format!("memo entry {i} out of order"));
        }
        if self.memo.len() <= i {
            self.memo.resize(i + 1, None);
        }
        self.memo[i] = self.stack.last().cloned();
        Ok(())
    }

    fn recall(&mut self, i: usize) -> Result<Value, String> {
        let known = self.memo.get(i).cloned().flatten();
        known.ok_or_else(|| format!("memo entry {i} is not set"))
    }

    fn global(&self, module: &str, name: &str) -> Result<Value, String> {
        let whole = format!("{module} {name}");
        if HARMLESS.contains(&whole.as_str()) {
            return Ok(Value::Opaque(whole.into()));
        }
        Err(format!(
            "it names {module}.{name}, which a loader state has no use for; refused"
        ))
    }

    fn extend(&mut self, items: Vec<Value>) -> Result<(), String> {
        match self.stack.last() {
            Some(Value::List(list)) => {
                list.borrow_mut().extend(items);
                Ok(())
            }
            Some(Value::Opaque(_)) => Ok(()),
            _ => Err("items for what is no list".into()),
        }
    }

    fn set(&mut self, items: Vec<Value>) -> Result<(), String> {
        match self.stack.last() {
            Some(Value::Dict(dict)) => {
                let mut items = items.into_iter();
                let mut dict = dict.borrow_mut();
                while let Some((key, value)) = items.next().zip(items.next()) {
                    dict.push((key, value));
                }
                Ok(())
            }
            Some(Value::Opaque(_)) => Ok(()),
            _ => Err("entries for what is no dictionary".into()),
        }
    }

    /// One instruction; the result at the last one.
    fn step(&mut self) -> Result<Option<Value>, String> {
        let list = |items| Value::List(Rc::new(RefCell::new(items)));
        let made = match self.byte()? as u8 {
            // PROTO, FRAME: nothing to do.
            0x80 => return self.take(1).map(|_| None),
            0x95 => return self.take(8).map(|_| None),
            b'.' => return self.pop().map(Some),
            b'(' => {
                self.marks.push(self.stack.len());
                return Ok(None);
            }
            b'0' => return self.pop().map(|_| None),
            b'q' => return self.byte().and_then(|i| self.remember(i)).map(|()| None),
            b'r' => return self.long().and_then(|i| self.remember(i)).map(|()| None),
            0x94 => return self.remember(self.memo.len()).map(|()| None),
            b'h' => {
                let i = self.byte()?;
                self.recall(i)?
            }
            b'j' => {
                let i = self.long()?;
                self.recall(i)?
            }
            b'N' => Value::None,
            0x88 => Value::Bool(true),
            0x89 => Value::Bool(false),
            b'K' => Value::Int(self.byte()? as i64),
            b'M' => Value::Int(u16_at(self.take(2)?, 0).unwrap_or(0) as i64),
            b'J' => Value::Int(i64::from(self.long()? as u32 as i32)),
            0x8a => {
                let n = self.byte()?;
                let bytes = self.take(n)?;
                if n > 8 {
                    return Err("an integer of more than 64 bits".into());
                }
                let sign = if bytes.last().is_some_and(|b| b & 0x80 != 0) {
                    0xff
                } else {
                    0
                };
                let mut whole = [sign; 8];
                whole[..n].copy_from_slice(bytes);
                Value::Int(i64::from_le_bytes(whole))
            }
            b'G' => {
                let bits = self.take(8)?.try_into().map_err(|_| "a float")?;
                Value::Float(f64::from_be_bytes(bits))
            }
            b'X' => {
                let n = self.long()?;
                self.text(n)?
            }
            0x8c => {
                let n = self.byte()?;
                self.text(n)?
            }
            b']' => list(Vec::new()),
            b')' => list(Vec::new()),
            b'l' | b't' => list(self.pop_mark()?),
            0x85 => list(self.pop_n(1)?),
            0x86 => list(self.pop_n(2)?),
            0x87 => list(self.pop_n(3)?),
            b'}' => Value::Dict(Rc::default()),
            b'a' => {
                let item = self.pop()?;
                return self.extend(vec![item]).map(|()| None);
            }
            b'e' => {
                let items = self.pop_mark()?;
                return self.extend(items).map(|()| None);
            }
            b's' => {
                let pair = self.pop_n(2)?;
                return self.set(pair).map(|()| None);
            }
            b'u' => {
                let items = self.pop_mark()?;
                return self.set(items).map(|()| None);
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(&module, &name)?
            }
            0x93 => {
                let names = self.pop_n(2)?;
                let [Some(module), Some(name)] = [names[0].text(), names[1].text()] else {
                    return Err("a name that is no text".into());
                };
                self.global(&module, &name)?
            }
            // REDUCE, NEWOBJ, BUILD, BINPERSID: the object stays what its class is called.
            b'R' | 0x81 | b'b' => {
                self.pop()?;
                match self.pop()? {
                    Value::Opaque(name) => Value::Opaque(name),
                    other => return Err(format!("{} is called", other.kind())),
                }
            }
            b'Q' => {
                self.pop()?;
                Value::Opaque("a storage".into())
            }
            other => {
                return Err(format!(
                    "instruction {other:#04x}, which torch.save does not write here"
                ));
            }
        };
        self.stack.push(made);
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `pickle.dumps({"a": [1, -2, 300, 70000, -5e9 as int], "b": (1.5, None, True), "c": "x"}, protocol=2)` of CPython 3.11.
    const SAMPLE: &[u8] = b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01]q\x02(K\x01J\xfe\xff\xff\xffM,\x01Jp\x11\x01\x00\x8a\x05\x00\x0e\xfa\xd5\xfeeX\x01\x00\x00\x00bq\x03G?\xf8\x00\x00\x00\x00\x00\x00N\x88\x87q\x04X\x01\x00\x00\x00cq\x05X\x01\x00\x00\x00xq\x06u.";

    #[test]
    fn plain_values_come_back() {
        let value = load(SAMPLE).expect("loads");
        let ints: Vec<i64> = value
            .get("a")
            .and_then(|a| a.items())
            .expect("a list")
            .iter()
            .filter_map(Value::int)
            .collect();
        assert_eq!(ints, [1, -2, 300, 70_000, -5_000_000_000]);
        let b = value.get("b").and_then(|b| b.items()).expect("a tuple");
        assert!(matches!(
            b[..],
            [Value::Float(1.5), Value::None, Value::Bool(true)]
        ));
        assert_eq!(value.get("c").and_then(|c| c.text()).as_deref(), Some("x"));
    }

    #[test]
    fn nothing_is_called() {
        // os.system("echo")
        let (at, said) = load(b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00echo\x85R.")
            .map(|_| ())
            .expect_err("refused");
        assert_eq!(at, 2);
        assert!(
            said.contains("posix.system") && said.contains("refused"),
            "{said}"
        );
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_a_value_or_words(head in 0..SAMPLE.len(), tail in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = load(&[&SAMPLE[..head], &tail].concat());
            let _ = member(&tail, "data.pkl").map(|_| ());
        }
    }
}
