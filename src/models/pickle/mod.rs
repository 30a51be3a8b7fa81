//! Python pickles as `torch.save` writes them, read without running anything.
//!
//! A pickle is a program for a stack machine that may name any Python object. [`scan`] walks all its opcodes first and
//! refuses every name outside [`Global`] and every opcode that torch does not write; only then does [`load`] run it,
//! with results kept in tables by index, so that neither deep nesting nor cycles can hurt.

mod machine;
mod opcodes;

use std::rc::Rc;

use anyhow::{Context, Result};
use tch::Kind;

use machine::Machine;
pub use opcodes::scan;
use opcodes::{Op, Reader};

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

/// Scans and then runs the pickle at the start of `bytes`.
pub fn load(bytes: &[u8]) -> Result<Unpickled> {
    scan(bytes)?;
    let mut reader = Reader::new(bytes);
    let mut m = Machine::default();
    loop {
        let at = reader.at();
        let op = reader.next()?;
        if let Op::Stop = op {
            break;
        }
        m.step(op).with_context(|| format!("the pickle is damaged at byte {at}"))?;
    }
    m.finish()
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
