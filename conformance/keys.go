package conformance

import (
	"strings"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var keyCases = []testCase{
	{rule: c1, name: "keys", needs: []Feature{Exact}, run: distinctKeys},
	{rule: c1, name: "limits", needs: []Feature{Exact}, run: distinctLimits},
	{rule: c1, name: "two handles", needs: []Feature{Exact, Shared}, provisional: "1.1", run: keysByTwoHandles},
}

// texts are keys that some stores mistook for one another, for patterns, or for part of their own syntax.
var texts = func() []string {
	all := []string{
		"a", "A", "b", "ab", "aB", "a/b", "a/B", "a/b/c", "ab/c", "a/bc", "a.b", "a-b", "a_b", "a,b", "a+b", "a b", "a|b", "a;b", "a=b", "a&b", "a@b", "a~b", "a^b", "a$b", "a!b",
		" ", "  ", " a", "a ", "a  ", "a\t", "\t", "\n", "a\n", "\r\n", "a\r\nGET a\r\n", "\x00", "a\x00", "a\x00b", "\x01", "\x7f", "\x1b[0m",
		"{", "}", "{}", "}{", "{a", "a}", "{a}", "{{a}}", "{a}b", "a{b}", "{a}/b", "a/{b}", "a/}", "}/a", "{b}/a",
		":", "a:", ":a", "a:b", "a:b:c", "a::b", "a:limit", "#", "a#", "#a", "a#r", "g#r",
		"%", "%%", "%s", "%d", "%00", "%2F", "%2f", "a%2Fb", "a%2fb", "a%252Fb", "%7B", "%7b", "%7D", "%257D", "%3A", "%20", "+",
		"*", "?", "a*", "a?", "[a]", "[ab]", "a_", "a__", "_", "__", "%a", "a%", "\\", "\\\\", "a\\", "\\0", "\\n", "\\x00", "'", "''", "\"", "\"\"", "`", "--", "a--", "';--", "' OR 1=1--", "*/b", "$1", "$a", "${a}", "@a", "<a>", "&amp;", "KEYS[1]", "]]--",
		".", "..", "...", "../a", "./a", "a/.", "a/..", "a/../b", "~", "~a", "CON", "nul", "con.txt",
		"0", "00", "1", "01", "1.0", "1e0", "-1", "+1", "0x1", "1_0", "true", "TRUE", "null", "NULL", "nil", "undefined", "NaN", "Infinity", "id", "key", "state",
		"é", "e\u0301", "É", "è", "e", "ß", "ss", "SS", "s", "S", "ſ", "k", "K", "\u212a", "i", "I", "ı", "İ", "ﬁ", "fi", "æ", "ae", "Ω", "\u2126", "ω", "а", "日本", "日本/語", "日", "\u3000", "\u00a0", "\u200b", "a\u200b", "\u200da", "\ufeff", "\ufeffa", "\ufffd", "\uffff", "\U0001f600", "\U0001f601", "\U0010ffff", "\u202ea", "ab\u0300", "a\u0300b",
	}
	// Long keys, up to the longest, that differ in their last, first or middle byte.
	for _, n := range []int{31, 32, 63, 64, 127, 128, 129, 191, 254, 255, 256, 257, 511} {
		k := strings.Repeat("k", n)
		all = append(all, k, k+"l", "l"+k, k[:n/2]+"l"+k[n/2:])
	}
	long := strings.Repeat("k", quota.MaxKey)
	half := strings.Repeat("k", quota.MaxKey/2-1)
	return append(all, long[1:]+"m", "m"+long[1:], half+"/"+half, half+"/"+half+"m", "%"+long[1:], strings.Repeat("%", quota.MaxKey), strings.Repeat("}", quota.MaxKey), strings.Repeat("é", quota.MaxKey/2), strings.Repeat("a/", 200)+"a")
}()

// distinctKeys charges every key, and peeks at each when all are charged.
func distinctKeys(t *trial) {
	l := t.named("limit", goOnly, numbers{limit: 1000})
	var all []quota.Charge
	for i, text := range texts {
		all = append(all, quota.Charge{Limit: l, Key: text, Cost: int64(1 + i%97)})
	}
	t.eachItsOwn(all)
}

// distinctLimits does the same with similar names of limits, and keys that look like names.
func distinctLimits(t *trial) {
	var all []quota.Charge
	for i, name := range limitNames {
		l := t.named(name, goOnly, numbers{limit: 1000})
		for j, key := range []string{"a", "b", "A", "ab", "a/b", "b/a", "a:b", "b:a", "{a}:b", "{a}/b:a"} {
			all = append(all, quota.Charge{Limit: l, Key: key, Cost: int64(1 + (7*i+j)%97)})
		}
	}
	t.eachItsOwn(all)
}

// limitNames are similar names of limits.
var limitNames = []string{"a", "A", "b", "ab", "a.b", "a-b", "a_b", "a.", "a-", ".a", ".", "-", "_", "0", "00", "1", "-1", "limit", "Limit", strings.Repeat("n", 64), strings.Repeat("n", 63), strings.Repeat("n", 63) + "m", "m" + strings.Repeat("n", 63)}

// eachItsOwn makes charges to different limits and keys, and peeks at each afterwards.
func (t *trial) eachItsOwn(all []quota.Charge) {
	var trace []step
	add := func(c quota.Charge) {
		trace = append(trace, step{id: 1 + len(trace), list: t.rng.IntN(2) == 0, charges: []charge{{Charge: c}}})
	}
	for _, i := range t.rng.Perm(len(all)) {
		add(all[i])
	}
	for _, i := range t.rng.Perm(len(all)) {
		c := all[i]
		c.Op, c.Cost = quota.OpPeek, 0
		add(c)
	}
	t.perform(trace)
}

// keysByTwoHandles charges each special key, and each limit of a special name, by one handle and looks at it by the other,
// in both directions. The handles have limits of their own, as two processes have.
func keysByTwoHandles(t *trial) {
	type spot struct {
		limits [2]*quota.Limit
		key    string
	}
	var all []spot
	limits := func(name string) (ls [2]*quota.Limit) {
		for i := range ls {
			ls[i] = t.named(name, goOnly, numbers{limit: 1000})
		}
		return ls
	}
	for ls, i := limits("limit"), 0; i < len(texts); i++ {
		all = append(all, spot{ls, texts[i]})
	}
	for _, name := range limitNames {
		ls := limits(name)
		for _, key := range []string{"a", "{a}:b"} {
			all = append(all, spot{ls, key})
		}
	}
	var trace []step
	lists := driver.AtomicityOf(t.open(Opening{}).store) != driver.OneKey
	for i, ls := 0, limits("listed"); lists && i+8 <= len(texts); i += 8 { // each in a list, and looked at by itself
		s := step{id: 1 + len(trace), other: i%16 == 0}
		for j, text := range texts[i : i+8] {
			if key := "g/" + text; quota.CheckKey(key) == nil {
				s.charges = append(s.charges, charge{Charge: quota.Charge{Limit: ls[i/8%2], Key: key, Cost: int64(1 + j)}})
			}
		}
		if len(s.charges) == 0 { // all are too long to have a group before them
			continue
		}
		trace = append(trace, s)
		for _, c := range s.charges {
			c.Limit, c.Op, c.Cost = ls[1-i/8%2], quota.OpPeek, 0
			trace = append(trace, step{id: 1 + len(trace), other: !s.other, charges: []charge{c}})
		}
	}
	add := func(s *spot, other bool, op quota.Op, cost int64) {
		n := 0
		if other {
			n = 1
		}
		trace = append(trace, step{id: 1 + len(trace), other: other, list: t.rng.IntN(2) == 0, charges: []charge{{Charge: quota.Charge{Limit: s.limits[n], Key: s.key, Op: op, Cost: cost}}}})
	}
	for i, n := range t.rng.Perm(len(all))[:t.suite.part(len(all))] {
		s := &all[n]
		by := i%2 == 0
		add(s, by, quota.OpTake, int64(1+i%97))
		add(s, !by, quota.OpPeek, 0)
		add(s, !by, quota.OpTake, int64(1+i%89))
		add(s, by, quota.OpPeek, 0)
		add(s, by, quota.OpReset, 0)
		add(s, !by, quota.OpPeek, 0)
	}
	t.perform(trace)
}
