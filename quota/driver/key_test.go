package driver_test

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

func TestAppendKeyForm(t *testing.T) {
	for _, c := range []struct{ limit, key, want string }{
		{"tokens", "agent-123", "{agent-123}:tokens"},
		{"tokens", "team-7/agent-123", "{team-7}/agent-123:tokens"},
		{"a.b", "x/y/z", "{x}/y/z:a.b"},
		{"t", "a{b}/c}", "{a%7Bb%7D}/c%7D:t"},
		{"t", "a%7B", "{a%257B}:t"},
		{"t", "a:t", "{a%3At}:t"},
		{"t", "\x00 \x7f\n", "{%00%20%7F%0A}:t"},
		{"t", "鍵", "{鍵}:t"},
	} {
		if got := string(driver.AppendKey(nil, c.limit, c.key)); got != c.want {
			t.Errorf("AppendKey(%q, %q): got %q, want %q", c.limit, c.key, got, c.want)
		}
	}
	if got, want := string(driver.AppendKey([]byte("quota:"), "t", "a")), "quota:{a}:t"; got != want {
		t.Errorf("AppendKey to a prefix: got %q, want %q", got, want)
	}
	if got, want := string(driver.AppendGroup([]byte("p"), "}{")), "p{%7D%7B}"; got != want {
		t.Errorf("AppendGroup to a prefix: got %q, want %q", got, want)
	}
}

// hostileKeys are ids that try to leave their place in the text; some are not valid keys.
func hostileKeys() []string {
	keys := []string{"", "}", "{", "{}", "}{", "a{b}", "{a}", "%7D", "%", "%%", "%25", "a%2Fb", "\x00", "a\x00", "\x7f", " ", "  ", "a b", "\r\n",
		strings.Repeat("x", 10_000), strings.Repeat("}", 10_000), "\xff", "\xc3\x28", "\xed\xa0\x80", "a/", "/a", "/", "//", "a//b", "a", "a/b", "a/b/c",
		":", "a:b", "a:t", "a/b:t", "a}:t", "a}/b", "#", "a#id", "é", "\u00a0", "\u2028", "\ufeff"}
	for a := byte(0x20); a < 0x7f; a++ {
		for b := byte(0x20); b < 0x7f; b++ {
			keys = append(keys, string([]byte{a, b}))
		}
	}
	return keys
}

func TestAppendKeyIsInjective(t *testing.T) {
	seen := map[string]string{}
	for _, key := range hostileKeys() {
		for _, limit := range []string{"t", "b", "a.b", "t-t"} {
			text := string(driver.AppendKey(nil, limit, key))
			testkit.Distinct(t, seen, text, fmt.Sprintf("%s of %.30q", limit, key))
			checkText(t, text, limit, key)
			checkParsed(t, text, limit, key)
		}
	}
}

// checkParsed fails unless the text of a limit and key parses to them if the key is valid, and begins with the text of a
// prefix exactly where the key begins with the prefix.
func checkParsed(t *testing.T, text, limit, key string) {
	t.Helper()
	if k, ok := driver.ParseKey(text); ok != (quota.CheckKey(key) == nil) || ok && k != (driver.ListedKey{Limit: limit, Key: key}) {
		t.Fatalf("ParseKey(%.80q): got %.80q, %v, want %q and %.40q if it is a key", text, k, ok, limit, key)
	}
	for n := range min(len(key)+1, 40) {
		if prefix := string(driver.AppendPrefix(nil, key[:n])); !strings.HasPrefix(text, prefix) {
			t.Fatalf("AppendPrefix(%.40q): got %.80q, want the beginning of %.80q", key[:n], prefix, text)
		}
	}
	for _, other := range []string{"a", "a/", "/", "%", "%2", "a%", "{", "}", ":", "\x00", "x/x", "é", "\xc3", " "} {
		prefix := string(driver.AppendPrefix(nil, other))
		if got, want := strings.HasPrefix(text, prefix), strings.HasPrefix(key, other); got != want {
			t.Fatalf("text of %.40q begins with %q of prefix %q: got %v, want %v", key, prefix, other, got, want)
		}
	}
}

func TestParseKeyRefuses(t *testing.T) {
	for _, text := range []string{"", "{}", "{a}", "{a}:", "a:t", "{a}#id", "{a}#id:t", "{a}b:t", "{a}/:t", "{a}/b", "{a}:t:u", "{:a}:t", "{%3a}:t", "{a%}:t", "{a%4}:t", "{a%41}:t", "{}:t", "{a{b}:t", " {a}:t", "{\xff}:t",
		string(driver.AppendKey(nil, "t", strings.Repeat("k", quota.MaxKey+1)))} {
		if k, ok := driver.ParseKey(text); ok {
			t.Errorf("ParseKey(%q): got %q, want it refused", text, k)
		}
	}
}

// checkText decodes a store's text of a limit and key without the library's help, and fails unless it is well-formed and
// decodes to that limit and key.
func checkText(t *testing.T, text, limit, key string) {
	t.Helper()
	for i := 0; i < len(text); i++ {
		if text[i] <= ' ' || text[i] == 0x7f {
			t.Fatalf("text of %.40q: got the byte %#x, want no space and no control byte", key, text[i])
		}
	}
	if strings.Count(text, "{") != 1 || strings.Count(text, "}") != 1 || text[0] != '{' {
		t.Fatalf("text of %.40q: got %.80q, want the braces of its group and no others", key, text)
	}
	tag, rest, _ := strings.Cut(text[1:], "}")
	path, gotLimit, ok := strings.Cut(rest, ":")
	if !ok || strings.Contains(gotLimit, ":") || gotLimit != limit {
		t.Fatalf("limit in the text of %.40q: got %q, found %v, want %q", key, gotLimit, ok, limit)
	}
	group, err := unescape(tag)
	if err != nil {
		t.Fatalf("group in the text of %.40q: got %v for %.40q, want valid escapes", key, err, tag)
	}
	if want, _, _ := strings.Cut(key, "/"); group != want {
		t.Fatalf("group in the text of %.40q: got %.40q, want %.40q", key, group, want)
	}
	tail, err := unescape(path)
	if err != nil || group+tail != key {
		t.Fatalf("key in the text %.80q: got %.40q, %v, want %.40q", text, group+tail, err, key)
	}
	if got, want := utf8.ValidString(text), utf8.ValidString(key); got != want {
		t.Fatalf("text of %.40q is UTF-8: got %v, want %v, as the key", key, got, want)
	}
}

func unescape(s string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '%' {
			b.WriteByte(s[i])
			continue
		}
		if i+2 >= len(s) {
			return "", fmt.Errorf("cut off escape in %q", s)
		}
		n, err := strconv.ParseUint(s[i+1:i+3], 16, 8)
		if err != nil {
			return "", err
		}
		b.WriteByte(byte(n))
		i += 2
	}
	return b.String(), nil
}

func FuzzAppendKey(f *testing.F) {
	for _, k := range []string{"a", "}", "a{b}", "team-7/agent-123", "\x00", "\xff/\xfe", "a%7D", "a:t/b"} {
		f.Add("t", k, "u", k+"x")
		f.Add("t", k, "t", strings.ReplaceAll(k, "}", "%7D"))
	}
	f.Fuzz(func(t *testing.T, limit1, key1, limit2, key2 string) {
		// Only limits that NewLimit accepts reach AppendKey; keys are taken as they come.
		for _, l := range []string{limit1, limit2} {
			if quota.NewLimit(l, testkit.Counter{Capacity: 1}).Err() != nil {
				t.Skip()
			}
		}
		text1, text2 := string(driver.AppendKey(nil, limit1, key1)), string(driver.AppendKey(nil, limit2, key2))
		checkText(t, text1, limit1, key1)
		checkParsed(t, text1, limit1, key1)
		if k, ok := driver.ParseKey(key2); ok && string(driver.AppendKey(nil, k.Limit, k.Key)) != key2 {
			t.Fatalf("ParseKey(%q): got %q, of which the text is another one", key2, k)
		}
		checkText(t, text2, limit2, key2)
		if same := limit1 == limit2 && key1 == key2; (text1 == text2) != same {
			t.Fatalf("texts of %q, %q and of %q, %q: got %q and %q, want them equal: %v", limit1, key1, limit2, key2, text1, text2, same)
		}
	})
}
