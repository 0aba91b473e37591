package quota_test

import (
	"fmt"
	"math/bits"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

func TestCheckKey(t *testing.T) {
	long := strings.Repeat("k", quota.MaxKey)
	for key, ok := range map[string]bool{
		"a": true, "team-7/agent-123": true, "a/b/c": true, " ": true, "a b": true, "{}": true, "%": true, "a:b": true,
		"\x00": true, "a\nb": true, "ключ/鍵": true, "abcdeï/a": true, "abcdefï": true, long: true, strings.Repeat("é", quota.MaxKey/2): true, "#": true,
		"": false, "/": false, "/a": false, "a/": false, "a//b": false, "//": false, long + "k": false,
		strings.Repeat("k", 10_000): false, "\xff": false, "a/\xc3": false, "\xed\xa0\x80": false, strings.Repeat("é", quota.MaxKey/2) + "e": false,
	} {
		switch err := quota.CheckKey(key); {
		case ok && err != nil:
			t.Errorf("CheckKey(%.20q): got %v, want nil", key, err)
		case !ok:
			testkit.WantInvalid(t, err, "key", "1 to 512 bytes")
			if n := len(err.Error()); n > 400 {
				t.Errorf("error for a key of %d bytes: got %d bytes, want 400 at most", len(key), n)
			}
		}
	}
}

// TestCheckKeyByBytes compares CheckKey with its words, for keys of all lengths and slashes in all places.
func TestCheckKeyByBytes(t *testing.T) {
	valid := func(key string) bool {
		return len(key) <= quota.MaxKey && utf8.ValidString(key) && !slices.Contains(strings.Split(key, "/"), "")
	}
	check := func(key string) {
		t.Helper()
		if err := quota.CheckKey(key); (err == nil) != valid(key) {
			t.Fatalf("CheckKey(%q): got %v, want an error %v", key, err, !valid(key))
		}
	}
	for n := range 20 {
		for slashes := range 1 << n {
			if n > 12 && bits.OnesCount(uint(slashes)) > 3 {
				continue
			}
			key := []byte("abcdefghijklmnopqrst")[:n]
			for i := range key {
				if slashes>>i&1 == 1 {
					key[i] = '/'
				}
			}
			check(string(key))
		}
	}
	for n := range 20 { // each byte that differs from a slash in one bit, and the others, in each place
		for c := range 256 {
			for i := range n {
				key := []byte("abcdefg/ijklmno/qrst")[:n]
				key[i] = byte(c)
				check(string(key))
			}
		}
	}
}

func TestKeyEscapes(t *testing.T) {
	for _, c := range []struct {
		segments []string
		want     string
	}{
		{[]string{"team-7", "agent-123"}, "team-7/agent-123"},
		{[]string{"a/b"}, "a%2Fb"},
		{[]string{"a%2Fb"}, "a%252Fb"},
		{[]string{"%", "/"}, "%25/%2F"},
		{[]string{"é {}:"}, "é {}:"},
		{nil, ""},
	} {
		if got := quota.Key(c.segments...); got != c.want {
			t.Errorf("Key(%q): got %q, want %q", c.segments, got, c.want)
		}
	}
	hostile := []string{"a", "b", "/", "%", "%2F", "a/b", "2F", "//", "a%"}
	seen := map[string]string{}
	for _, a := range hostile {
		testkit.Distinct(t, seen, quota.Key(a), fmt.Sprintf("%q", a))
		for _, b := range hostile {
			testkit.Distinct(t, seen, quota.Key(a, b), fmt.Sprintf("%q %q", a, b))
		}
	}
}

func TestGroup(t *testing.T) {
	for key, want := range map[string]string{"a": "a", "a/b": "a", "a/b/c": "a", "": "", "/x": "", "a b/c": "a b"} {
		if got := quota.Group(key); got != want {
			t.Errorf("Group(%q): got %q, want %q", key, got, want)
		}
	}
}
