package conformance

import (
	"fmt"
	"strings"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var keyCases = []testCase{
	{rule: c1, name: "keys", needs: []Feature{Exact}, run: distinctKeys},
	{rule: c1, name: "limits", needs: []Feature{Exact}, run: distinctLimits},
	{rule: c1, name: "ids", needs: []Feature{Exact, IDs}, run: distinctIDs},
}

// texts are keys that stores have taken for each other, for patterns, or for part of their own syntax.
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
	// Alike but for their last, first or middle byte, up to the longest there are.
	for _, n := range []int{31, 32, 63, 64, 127, 128, 129, 191, 254, 255, 256, 257, 511} {
		k := strings.Repeat("k", n)
		all = append(all, k, k+"l", "l"+k, k[:n/2]+"l"+k[n/2:])
	}
	long := strings.Repeat("k", quota.MaxKey)
	half := strings.Repeat("k", quota.MaxKey/2-1)
	return append(all, long[1:]+"m", "m"+long[1:], half+"/"+half, half+"/"+half+"m", "%"+long[1:], strings.Repeat("%", quota.MaxKey), strings.Repeat("}", quota.MaxKey), strings.Repeat("é", quota.MaxKey/2), strings.Repeat("a/", 200)+"a")
}()

// distinctKeys charges every key, and looks at all again when all are charged.
func distinctKeys(t *trial) {
	l := t.named("limit", goOnly, numbers{limit: 1000})
	var all []quota.Charge
	for i, text := range texts {
		all = append(all, quota.Charge{Limit: l, Key: text, Cost: int64(1 + i%97)})
	}
	t.eachItsOwn(all)
}

// distinctLimits does the same with names of limits that are alike, and keys that look like names.
func distinctLimits(t *trial) {
	names := []string{"a", "A", "b", "ab", "a.b", "a-b", "a_b", "a.", "a-", ".a", ".", "-", "_", "0", "00", "1", "-1", "limit", "Limit", strings.Repeat("n", 64), strings.Repeat("n", 63), strings.Repeat("n", 63) + "m", "m" + strings.Repeat("n", 63)}
	var all []quota.Charge
	for i, name := range names {
		l := t.named(name, goOnly, numbers{limit: 1000})
		for j, key := range []string{"a", "b", "A", "ab", "a/b", "b/a", "a:b", "b:a", "{a}:b", "{a}/b:a"} {
			all = append(all, quota.Charge{Limit: l, Key: key, Cost: int64(1 + (7*i+j)%97)})
		}
	}
	t.eachItsOwn(all)
}

// eachItsOwn makes the charges, no two to one limit and key, and looks at all again.
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

// distinctIDs makes charges under ids that are alike, and repeats all.
func distinctIDs(t *trial) {
	l := t.named("limit", goOnly, numbers{limit: 1 << 30})
	var trace []step
	add := func(id, key string, cost int64) {
		if len(id) > 128 {
			return
		}
		trace = append(trace, step{id: 1 + len(trace), list: t.rng.IntN(2) == 0, charges: []charge{{Charge: quota.Charge{Limit: l, Key: key, Cost: cost, ID: id}}}})
	}
	for range 2 {
		for i, id := range texts {
			add(id, "g", int64(1+i%97))
		}
		// Ids count within their group, and are no keys.
		for i, key := range []string{"a", "A", "b", "{a}", "a#r", "{a}#r", "g#r", "#r", "r"} {
			add("r", key, int64(1+i))
			add("r2", key+"/sub", int64(1+i))
		}
	}
	t.perform(trace)
}

// perform plays a trace on new data and fails the case if it is answered wrongly.
func (t *trial) perform(trace []step) {
	injected := !t.lacks(Clock)
	var why error
	for range 3 {
		wrong, at, unsure := t.replay(trace, injected)
		switch {
		case wrong != "":
			t.refute(trace[:at+1], wrong, injected)
			return
		case unsure == nil:
			return
		}
		why = unsure
	}
	t.skipf("not judged, because the store does not answer: %v", why)
}

var misfitCases = []testCase{
	{rule: c8, name: "rules", needs: []Feature{Exact}, run: otherRules},
}

// otherRules changes the rule of limits that hold state, in every pair, until a reset.
func otherRules(t *trial) {
	var trace []step
	for i, k := range kinds {
		for j, other := range kinds {
			if k.name == other.name || (k.name == fixedWindow.name || k.name == fromFirst.name) && (other.name == fixedWindow.name || other.name == fromFirst.name) {
				continue
			}
			name := fmt.Sprintf("pair%d.%d", i, j)
			is := t.named(name, k, numbers{10, 1, 10 * 24 * 365 * 60 * 60 * 1e8})
			was := t.named(name, other, numbers{10, 1, 10 * 24 * 365 * 60 * 60 * 1e8})
			good := t.named("good", tokenBucket, numbers{1000, 1, 1e9})
			add := func(list bool, cs ...quota.Charge) {
				s := step{id: 1 + len(trace), list: list}
				for _, c := range cs {
					c.Key = "g/" + c.Key
					s.charges = append(s.charges, charge{Charge: c})
				}
				trace = append(trace, s)
			}
			add(false, quota.Charge{Limit: was, Key: "k", Cost: 3})
			for op := quota.OpTake; op <= quota.OpReset; op++ {
				add(op%2 == 0, quota.Charge{Limit: is, Key: "k", Cost: 1, Op: op})
			}
			if atomicity(t.open(Opening{}).store) != driver.OneKey {
				add(true, quota.Charge{Limit: good, Key: "k", Cost: 1}, quota.Charge{Limit: is, Key: "k", Cost: 1})
				add(true, quota.Charge{Limit: is, Key: "k", Cost: 1}, quota.Charge{Limit: good, Key: "k", Cost: 1})
			}
			add(false, quota.Charge{Limit: is, Key: "another", Cost: 2})
			add(false, quota.Charge{Limit: was, Key: "k", Cost: 2})
			add(false, quota.Charge{Limit: was, Key: "k", Op: quota.OpReset})
			add(false, quota.Charge{Limit: is, Key: "k", Cost: 2})
			add(false, quota.Charge{Limit: good, Key: "k", Op: quota.OpPeek})
		}
	}
	t.perform(trace)
}
