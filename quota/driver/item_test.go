package driver_test

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// golden runs a short fixed history of each rule and returns the text it leaves after each step. Stores keep these texts, so
// a release that changes them cannot read the states of the last one: a change here needs a new Rule.
func golden(t *testing.T) []string {
	var lines []string
	for _, r := range testkit.Rules {
		l := testkit.LimitOf("n", r.Name, 10, 3*time.Second)
		var it driver.Item
		for _, step := range []struct {
			name  string
			after quota.Micros
			op    quota.Op
			cost  int64
		}{
			{"take", 0, quota.OpTake, 3}, {"later", 700_001, quota.OpTake, 4}, {"debit", 700_002, quota.OpDebit, 8},
			{"window", 3_700_003, quota.OpTake, 0}, {"again", 4_000_000, quota.OpDebit, 1}, {"refund", 4_000_001, quota.OpRefund, 1}, {"reset", 4_000_002, quota.OpReset, 0},
		} {
			c := quota.Charge{Limit: l, Key: "k", Op: step.op, Cost: step.cost}
			if step.op == quota.OpRefund {
				c.MadeAt = testkit.Epoch + 4_000_000
			}
			mustDecide(t, c, &it, testkit.Epoch+step.after)
			text := ""
			if !it.State.IsZero() {
				text = string(it.AppendText(nil))
			}
			lines = append(lines, fmt.Sprintf("%s %s %s", r.Name, step.name, text))
		}
	}
	return lines
}

func TestGoldenItems(t *testing.T) {
	const file = "testdata/items.golden"
	got := golden(t)
	if *update {
		if err := os.WriteFile(file, []byte(strings.Join(got, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for i := range got {
		if !lines.Scan() {
			t.Fatalf("lines of %s: got %d, want %d", file, i, len(got))
		}
		if lines.Text() != got[i] {
			t.Errorf("step %d: got %q, want the frozen %q", i, got[i], lines.Text())
		}
		text := lines.Text()[strings.LastIndexByte(lines.Text(), ' ')+1:]
		it, err := driver.ParseItem(text)
		if err != nil {
			t.Errorf("ParseItem(%q): got %v, want nil", text, err)
		} else if back := string(it.AppendText(nil)); text != "" && back != text {
			t.Errorf("ParseItem(%q) and AppendText: got %q, want the same text", text, back)
		}
	}
	if lines.Scan() {
		t.Errorf("lines of %s: got more than %d, want %d", file, len(got), len(got))
	}
}

func TestItemRoundTrip(t *testing.T) {
	r := random(t)
	number := func() int64 {
		n := r.Int64N(1<<53+1) >> r.IntN(53)
		if r.IntN(4) == 0 {
			n = -n
		}
		return n
	}
	for range sized(5000, 100_000) {
		it := driver.Item{Rule: randomRule(r), State: quota.State{Unit: max(1, number()), A: number(), B: number(), C: number()}}
		if r.IntN(3) == 0 {
			for range 1 + r.IntN(20) {
				it.State.Tail = append(it.State.Tail, number())
			}
		}
		text := string(it.AppendText(nil))
		if got, err := driver.ParseItem(text); err != nil || !reflect.DeepEqual(got, it) {
			t.Fatalf("ParseItem(%q): got %+v, %v, want %+v", text, got, err, it)
		}
	}
	long := driver.Item{Rule: quota.Rule{'x'}, State: quota.State{Unit: 1, Tail: make([]int64, quota.MaxTail)}}
	if got, err := driver.ParseItem(string(long.AppendText(nil))); err != nil || !reflect.DeepEqual(got, long) {
		t.Errorf("ParseItem of the longest tail: got a tail of %d, %v, want the item with a tail of %d", len(got.State.Tail), err, quota.MaxTail)
	}
	if got, err := driver.ParseItem(""); err != nil || !reflect.DeepEqual(got, driver.Item{}) {
		t.Errorf("ParseItem of the empty text: got %+v, %v, want the zero Item", got, err)
	}
	short := driver.Item{Rule: quota.Rule{'x', '1'}, State: quota.State{Unit: 2, A: -3}}
	if got, want := string(short.AppendText([]byte("p="))), "p=x1:2:-3:0:0"; got != want {
		t.Errorf("AppendText: got %q, want %q", got, want)
	}
}

func randomRule(r *rand.Rand) (rule quota.Rule) {
	const letters = "abcxyzABCXYZ019._-"
	for i := range 1 + r.IntN(len(rule)) {
		rule[i] = letters[r.IntN(len(letters))]
	}
	return rule
}

func TestParseItemRefuses(t *testing.T) {
	for _, text := range []string{
		"tb1", "tb1:", "tb1:1", "tb1:1:2:3", "tb1:1:2:3:", "tb1:1:2:3:4:", ":1:2:3:4", "tb1::2:3:4", "1:2:3:4", "ninechars:1:2:3:4",
		"tb1:0:2:3:4", "tb1:-1:2:3:4", "tb1:1:2:3:x", "tb1:1:2:3:4.0", "tb1:1:2:3:1e5", "tb1:1:2:3:0x1", "tb1:1:2:3:1_0", "tb1:1:2:3: 4",
		"tb1:1:2:3:4 ", "tb1:1:2:3:4\n", " tb1:1:2:3:4", "tb1:1:2:3:+4", "tb1:1:2:3:04", "tb1:01:2:3:4", "tb1:1:2:3:-0", "tb1:1:2:3:-04", "tb1:1:00:3:4", "tb1:1:2:3:--4",
		"tb1:1:9007199254740993:3:4", "tb1:1:2:-9007199254740993:4", "tb1:1:2:3:99999999999999999999", "t\x00:1:2:3:4", "\x00:1:2:3:4", "t b:1:2:3:4", "té:1:2:3:4",
		"hello", "{}", "tb1:1:2:3:٣", strings.Repeat(":", 9000), "x:1:0:0:0" + strings.Repeat(":0", quota.MaxTail+1), strings.Repeat("9", 100_000),
	} {
		it, err := driver.ParseItem(text)
		if !errors.Is(err, quota.ErrMisconfigured) || !reflect.DeepEqual(it, driver.Item{}) {
			t.Errorf("ParseItem(%.40q): got %+v, %v, want the zero Item and ErrMisconfigured", text, it, err)
		} else if len(err.Error()) > 250 {
			t.Errorf("error of ParseItem(%.40q): got %d bytes, want 250 at most", text, len(err.Error()))
		}
	}
	for _, text := range []string{"tb1:1:9007199254740992:-9007199254740992:0", "tb1:1:-4:0:10", "12345678:1:2:3:4:5"} {
		if _, err := driver.ParseItem(text); err != nil {
			t.Errorf("ParseItem(%q): got %v, want nil", text, err)
		}
	}
}

func FuzzParseItem(f *testing.F) {
	for _, s := range []string{"", "tb1:100000:250000:1795427141791724:0", "sl1:1:7:0:0:1795427141791724:3:1795427141791725:4", "x:1:-1:0:0", "tb1:1:2:3:04", "tb1:1:2:3:-0", "tb1:1:2:3:9007199254740993"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		it, err := driver.ParseItem(text)
		switch {
		case err != nil:
			if !errors.Is(err, quota.ErrMisconfigured) {
				t.Fatalf("ParseItem(%q): got %v, want ErrMisconfigured", text, err)
			}
		case text == "":
			if !reflect.DeepEqual(it, driver.Item{}) {
				t.Fatalf("ParseItem of the empty text: got %+v, want the zero Item", it)
			}
		case string(it.AppendText(nil)) != text:
			t.Fatalf("ParseItem(%q) and AppendText: got %q, want the same text", text, it.AppendText(nil))
		}
	})
}
