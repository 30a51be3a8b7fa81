//! Python pickles as `torch.save` writes them, read without running anything.
//!
//! A pickle is a program for a stack machine that may name any Python object. [`scan`] walks all its opcodes first and
//! refuses every name outside [`Global`] and every opcode that torch does not write; only then does [`load`] run it,
//! with results kept in tables by index, so that neither deep nesting nor cycles can hurt.

use std::{collections::HashMap, rc::Rc};

use anyhow::{bail, ensure, Context, Result};
use tch::Kind;

/// The only names that a pickle may mention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Kind),
}

impl Global {
    fn named(module: &str, name: &str) -> Option<Global> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
            ("torch", "FloatStorage") => Global::Storage(Kind::Float),
            ("torch", "HalfStorage") => Global::Storage(Kind::Half),
            ("torch", "BFloat16Storage") => Global::Storage(Kind::BFloat16),
            ("torch", "DoubleStorage") => Global::Storage(Kind::Double),
            ("torch", "LongStorage") => Global::Storage(Kind::Int64),
            ("torch", "IntStorage") => Global::Storage(Kind::Int),
            ("torch", "ByteStorage") => Global::Storage(Kind::Uint8),
            ("torch", "BoolStorage") => Global::Storage(Kind::Bool),
            _ => return None,
        })
    }
}

/// What lies on the stack. Indices point into the tables of [`Unpickled`].
#[derive(Clone, Debug)]
pub enum Value {
    None,
    Bool(bool),
    Int(i64),
    /// An integer of more than 64 bits, little-endian two's complement.
    LargeInt(Rc<[u8]>),
    Float(f64),
    Text(Rc<str>),
    Sequence(usize),
    Dict(usize),
    Storage(usize),
    Tensor(usize),
    Global(Global),
}

/// Where a tensor's elements lie; the file says the rest.
#[derive(Clone, Debug, PartialEq)]
pub struct StorageRef {
    pub key: Rc<str>,
    pub kind: Kind,
    /// Elements.
    pub count: usize,
}

/// A view of a storage; offset and strides in elements.
#[derive(Clone, Debug)]
pub struct TensorRef {
    pub storage: usize,
    pub offset: usize,
    pub size: Vec<usize>,
    pub stride: Vec<usize>,
}

/// The result of a pickle.
#[derive(Debug)]
pub struct Unpickled {
    pub root: Value,
    pub sequences: Vec<Vec<Value>>,
    pub dicts: Vec<Vec<(Value, Value)>>,
    /// One per key.
    pub storages: Vec<StorageRef>,
    pub tensors: Vec<TensorRef>,
}

impl Unpickled {
    /// The value of `key` in the dict `dict`; of several the last, as in Python.
    pub fn get(&self, dict: usize, key: &str) -> Option<&Value> {
        let named = |entry: &&(Value, Value)| matches!(&entry.0, Value::Text(text) if **text == *key);
        self.dicts[dict].iter().rev().find(named).map(|(_, value)| value)
    }
}

/// One step of the stack machine.
#[derive(Debug)]
enum Op<'a> {
    Protocol(u8),
    Push(Value),
    Text(&'a str),
    EmptyDict,
    EmptySequence,
    Mark,
    /// A tuple of the values above the mark, or of the last n.
    Tuple(Option<usize>),
    Put(u32),
    Get(u32),
    Append,
    Appends,
    SetItem,
    SetItems,
    Global(&'a str, &'a str),
    Reduce,
    Build,
    PersistentId,
    Stop,
    /// Names an object by the two texts last pushed; never accepted, but named in the refusal.
    StackGlobal,
    Memoize,
    Frame,
}

/// Reads opcodes off a byte string.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.bytes.len());
        let end = end.with_context(|| format!("the pickle ends inside an opcode, at byte {}", self.bytes.len()))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.take(2)?.try_into()?))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into()?))
    }

    fn text(&mut self, length: usize) -> Result<&'a str> {
        let at = self.at;
        std::str::from_utf8(self.take(length)?).with_context(|| format!("text at byte {at} of the pickle"))
    }

    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().position(|&b| b == b'\n').context("the pickle ends inside a name")?;
        let line = self.text(end)?;
        self.at += 1;
        Ok(line)
    }

    fn integer(&mut self, length: usize) -> Result<Value> {
        let bytes = self.take(length)?;
        if bytes.len() > 8 {
            return Ok(Value::LargeInt(bytes.into()));
        }
        let mut wide = [if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 }; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        Ok(Value::Int(i64::from_le_bytes(wide)))
    }

    fn next(&mut self) -> Result<Op<'a>> {
        let at = self.at;
        Ok(match self.byte()? {
            0x80 => Op::Protocol(self.byte()?),
            b'}' => Op::EmptyDict,
            b']' => Op::EmptySequence,
            b')' => Op::Tuple(Some(0)),
            0x85 => Op::Tuple(Some(1)),
            0x86 => Op::Tuple(Some(2)),
            0x87 => Op::Tuple(Some(3)),
            b't' => Op::Tuple(None),
            b'(' => Op::Mark,
            b'q' => Op::Put(u32::from(self.byte()?)),
            b'r' => Op::Put(self.u32()?),
            b'h' => Op::Get(u32::from(self.byte()?)),
            b'j' => Op::Get(self.u32()?),
            b'X' | b'T' => {
                let length = self.u32()? as usize;
                Op::Text(self.text(length)?)
            }
            b'U' | 0x8c => {
                let length = usize::from(self.byte()?);
                Op::Text(self.text(length)?)
            }
            b'J' => Op::Push(Value::Int(i64::from(self.u32()? as i32))),
            b'K' => Op::Push(Value::Int(i64::from(self.byte()?))),
            b'M' => Op::Push(Value::Int(i64::from(self.u16()?))),
            0x8a => {
                let length = usize::from(self.byte()?);
                Op::Push(self.integer(length)?)
            }
            b'G' => Op::Push(Value::Float(f64::from_be_bytes(self.take(8)?.try_into()?))),
            0x88 => Op::Push(Value::Bool(true)),
            0x89 => Op::Push(Value::Bool(false)),
            b'N' => Op::Push(Value::None),
            b'a' => Op::Append,
            b'e' => Op::Appends,
            b's' => Op::SetItem,
            b'u' => Op::SetItems,
            // `i` makes an instance of the class it names; [`scan`] sees to the name
            b'c' | b'i' => Op::Global(self.line()?, self.line()?),
            0x93 => Op::StackGlobal,
            0x94 => Op::Memoize,
            0x95 => self.take(8).map(|_| Op::Frame)?,
            b'R' => Op::Reduce,
            b'b' => Op::Build,
            b'Q' => Op::PersistentId,
            b'.' => Op::Stop,
            other => bail!("opcode 0x{other:02x} at byte {at} of the pickle is not one that torch.save writes"),
        })
    }
}

/// Walks the pickle at the start of `bytes` without building anything; its length in bytes.
///
/// # Errors
/// Names the first object outside the accepted ones, else the first opcode that torch does not write.
pub fn scan(bytes: &[u8]) -> Result<usize> {
    let mut reader = Reader { bytes, at: 0 };
    let mut texts = ["?"; 2];
    let mut protocol = 0;
    loop {
        let at = reader.at;
        match reader.next()? {
            Op::Protocol(version) => protocol = version,
            Op::Text(text) => texts = [texts[1], text],
            Op::StackGlobal => bail!("the pickle asks for {}.{}, which is not accepted", texts[0], texts[1]),
            Op::Global(module, name) if Global::named(module, name).is_none() || bytes[at] == b'i' => {
                bail!("the pickle asks for {module}.{name}, which is not accepted")
            }
            Op::Memoize | Op::Frame if protocol > 2 => {}
            Op::Memoize | Op::Frame => bail!("opcode 0x{:02x} at byte {at} does not belong to protocol 2", bytes[at]),
            Op::Stop => break,
            _ => {}
        }
    }
    ensure!(protocol == 2, "the pickle has protocol {protocol}; torch.save writes 2");
    Ok(reader.at)
}

/// The stack machine.
#[derive(Default)]
struct Machine {
    stack: Vec<Value>,
    /// Heights of the stack at the open marks.
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    sequences: Vec<Vec<Value>>,
    dicts: Vec<Vec<(Value, Value)>>,
    storages: Vec<StorageRef>,
    storage_of_key: HashMap<Rc<str>, usize>,
    tensors: Vec<TensorRef>,
}

/// Scans and then runs the pickle at the start of `bytes`.
pub fn load(bytes: &[u8]) -> Result<Unpickled> {
    scan(bytes)?;
    let mut reader = Reader { bytes, at: 0 };
    let mut m = Machine::default();
    loop {
        let at = reader.at;
        let op = reader.next()?;
        if let Op::Stop = op {
            break;
        }
        m.step(op).with_context(|| format!("the pickle is damaged at byte {at}"))?;
    }
    let root = m.pop()?;
    Ok(Unpickled { root, sequences: m.sequences, dicts: m.dicts, storages: m.storages, tensors: m.tensors })
}

impl Machine {
    fn pop(&mut self) -> Result<Value> {
        let floor = self.marks.last().copied().unwrap_or(0);
        ensure!(self.stack.len() > floor, "the stack is empty");
        Ok(self.stack.pop().expect("just checked"))
    }

    fn top(&self) -> Result<&Value> {
        self.stack.last().context("the stack is empty")
    }

    /// The values above the last mark, which is closed.
    fn above_mark(&mut self) -> Result<Vec<Value>> {
        let mark = self.marks.pop().context("no mark is open")?;
        Ok(self.stack.split_off(mark))
    }

    fn push_sequence(&mut self, values: Vec<Value>) {
        self.sequences.push(values);
        self.stack.push(Value::Sequence(self.sequences.len() - 1));
    }

    fn push_dict(&mut self) {
        self.dicts.push(Vec::new());
        self.stack.push(Value::Dict(self.dicts.len() - 1));
    }

    fn step(&mut self, op: Op) -> Result<()> {
        match op {
            Op::Protocol(_) => {}
            Op::Push(value) => self.stack.push(value),
            Op::Text(text) => self.stack.push(Value::Text(text.into())),
            Op::EmptyDict => self.push_dict(),
            Op::EmptySequence => self.push_sequence(Vec::new()),
            Op::Mark => self.marks.push(self.stack.len()),
            Op::Tuple(None) => {
                let values = self.above_mark()?;
                self.push_sequence(values);
            }
            Op::Tuple(Some(count)) => {
                let mut values = (0..count).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
                values.reverse();
                self.push_sequence(values);
            }
            Op::Put(index) => drop(self.memo.insert(index, self.top()?.clone())),
            Op::Get(index) => {
                let value = self.memo.get(&index).with_context(|| format!("memo {index} is not set"))?;
                self.stack.push(value.clone());
            }
            Op::Append => {
                let value = self.pop()?;
                self.append(vec![value])?;
            }
            Op::Appends => {
                let values = self.above_mark()?;
                self.append(values)?;
            }
            Op::SetItem => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(vec![key, value])?;
            }
            Op::SetItems => {
                let values = self.above_mark()?;
                self.set_items(values)?;
            }
            Op::Global(module, name) => {
                self.stack.push(Value::Global(Global::named(module, name).context("a name that is not accepted")?));
            }
            Op::Reduce => self.reduce()?,
            Op::Build => {
                // OrderedDicts carry `_metadata`, which is of no use here
                self.pop()?;
                ensure!(matches!(self.top()?, Value::Dict(_)), "a state for something other than a dict");
            }
            Op::PersistentId => self.storage()?,
            Op::StackGlobal | Op::Memoize | Op::Frame | Op::Stop => bail!("an opcode that the scan refuses"),
        }
        Ok(())
    }

    fn append(&mut self, values: Vec<Value>) -> Result<()> {
        let Value::Sequence(list) = *self.top()? else { bail!("an element for something other than a list") };
        self.sequences[list].extend(values);
        Ok(())
    }

    fn set_items(&mut self, values: Vec<Value>) -> Result<()> {
        let Value::Dict(dict) = *self.top()? else { bail!("an item for something other than a dict") };
        ensure!(values.len() % 2 == 0, "a key without a value");
        let mut values = values.into_iter();
        while let (Some(key), Some(value)) = (values.next(), values.next()) {
            self.dicts[dict].push((key, value));
        }
        Ok(())
    }

    fn sequence(&self, value: &Value) -> Result<&[Value]> {
        match value {
            Value::Sequence(index) => Ok(&self.sequences[*index]),
            other => bail!("expected a tuple, found {other:?}"),
        }
    }

    fn reduce(&mut self) -> Result<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let arguments = self.sequence(&arguments)?.to_vec();
        match function {
            Value::Global(Global::OrderedDict) => {
                ensure!(arguments.is_empty(), "an OrderedDict with arguments");
                self.push_dict();
            }
            Value::Global(Global::RebuildTensor) => {
                let tensor = self.tensor(&arguments)?;
                self.tensors.push(tensor);
                self.stack.push(Value::Tensor(self.tensors.len() - 1));
            }
            Value::Global(Global::RebuildParameter) => match arguments.first() {
                Some(tensor @ Value::Tensor(_)) => self.stack.push(tensor.clone()),
                other => bail!("a parameter of {other:?}"),
            },
            other => bail!("a call of {other:?}"),
        }
        Ok(())
    }

    /// (storage, offset, size, stride, …) of `_rebuild_tensor_v2`.
    fn tensor(&self, arguments: &[Value]) -> Result<TensorRef> {
        let [Value::Storage(storage), offset, size, stride, ..] = arguments else {
            bail!("a tensor that is not made of storage, offset, size and stride")
        };
        let counts = |value: &Value| self.sequence(value)?.iter().map(count).collect::<Result<Vec<_>>>();
        let (size, stride) = (counts(size)?, counts(stride)?);
        ensure!(size.len() == stride.len(), "a tensor with {} sizes and {} strides", size.len(), stride.len());
        Ok(TensorRef { storage: *storage, offset: count(offset)?, size, stride })
    }

    /// ('storage', type, key, location, elements[, view]) on the stack → the storage.
    fn storage(&mut self) -> Result<()> {
        let id = self.pop()?;
        let found = match self.sequence(&id)? {
            [Value::Text(tag), Value::Global(Global::Storage(kind)), Value::Text(key), Value::Text(_), elements, view @ ..]
                if **tag == *"storage" && matches!(view, [] | [Value::None]) =>
            {
                StorageRef { key: key.clone(), kind: *kind, count: count(elements)? }
            }
            other => bail!("a persistent id that is no storage: {other:?}"),
        };
        let index = match self.storage_of_key.get(&found.key) {
            Some(&index) => {
                ensure!(self.storages[index] == found, "storage {} is declared twice, differently", found.key);
                index
            }
            None => {
                self.storage_of_key.insert(found.key.clone(), self.storages.len());
                self.storages.push(found);
                self.storages.len() - 1
            }
        };
        self.stack.push(Value::Storage(index));
        Ok(())
    }
}

fn count(value: &Value) -> Result<usize> {
    match value {
        Value::Int(n) => usize::try_from(*n).with_context(|| format!("a negative number of elements: {n}")),
        other => bail!("expected a number of elements, found {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_shared_through_the_memo() {
        // [x, x, (1, -2, 2.5, True, None)] with x = {"a": [0]}, memoised before it is filled
        let mut bytes = b"\x80\x02](}q\x01X\x01\0\0\0a]K\0ash\x01(K\x01J\xfe\xff\xff\xffG".to_vec();
        bytes.extend(2.5f64.to_be_bytes());
        bytes.extend(b"\x88Nte.");
        let all = load(&bytes).unwrap();
        let Value::Sequence(root) = all.root else { panic!("{:?}", all.root) };
        let [Value::Dict(a), Value::Dict(b), Value::Sequence(tuple)] = all.sequences[root][..] else { panic!() };
        assert_eq!(a, b);
        assert!(matches!(all.get(a, "a"), Some(Value::Sequence(_))) && all.get(a, "b").is_none());
        let expected = "[Int(1), Int(-2), Float(2.5), Bool(true), None]";
        assert_eq!(format!("{:?}", all.sequences[tuple]), expected);
    }

    #[test]
    fn foreign_names_are_refused_before_anything_is_built() {
        let cases: [(&[u8], &str); 5] = [
            (b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R.", "posix.system"),
            (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
            (b"(ios\nsystem\n.", "os.system"),
            (b"\x80\x04\x95\x1d\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.", "posix.system"),
            // damage in front of the name changes nothing
            (b"\x80\x02uuRctorch.nn\nLinear\n.", "torch.nn.Linear"),
        ];
        for (bytes, name) in cases {
            let error = load(bytes).unwrap_err().to_string();
            assert!(error.contains(&format!("asks for {name}, which is not accepted")), "{error}");
        }
    }

    #[test]
    fn depth_and_cycles_do_no_harm() {
        let mut deep = b"\x80\x02N".to_vec();
        deep.extend(std::iter::repeat_n(0x85, 1_000_000));
        deep.push(b'.');
        assert_eq!(load(&deep).unwrap().sequences.len(), 1_000_000);
        // l = []; l.append(l)
        assert_eq!(load(b"\x80\x02]q\0h\0a.").unwrap().sequences[0].len(), 1);
        for bad in
            [&b"\x80\x02."[..], b"\x80\x02(.", b"\x80\x02(0.", b"\x80\x02Ne.", b"\x80\x02(N)u.", b"\x80\x03N.", b""]
        {
            assert!(load(bad).is_err(), "{bad:?}");
        }
    }
}
