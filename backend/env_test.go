package backend_test

import (
	"errors"
	"math/big"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/quota"
)

func setenv(t *testing.T, url, size, rate string) {
	t.Helper()
	t.Setenv("REDIS_URL", url)
	t.Setenv("TOKEN_BUCKET_SIZE", size)
	t.Setenv("TOKEN_REFILL_RATE", rate)
}

func TestFromEnv(t *testing.T) {
	for _, test := range []struct {
		url, size, rate  string
		capacity, refill int64
		per              time.Duration
	}{
		{"", "", "", 1000, 10, time.Second},
		{"memory://", "1", "1", 1, 1, time.Second},
		{"memory://?max_keys=5", "500", "10.5", 500, 21, 2 * time.Second},
		{"", "", "10.0", 1000, 10, time.Second},
		{"", "", "0010.500", 1000, 21, 2 * time.Second},
		{"", "", "0.1", 1000, 1, 10 * time.Second},
		{"", "3", "0.00000001", 3, 1, 1e8 * time.Second},
		{"", "", "3.14159265", 1000, 62831853, 2e7 * time.Second},
		{"", "", "0.3333", 1000, 3333, 1e4 * time.Second},
		{"", "4503599627370495", "1000000000", 1<<52 - 1, 1e9, time.Second},
		{"", "007", "1000000000.00000000000000", 7, 1e9, time.Second},
	} {
		setenv(t, test.url, test.size, test.rate)
		e, err := backend.FromEnv(t.Context())
		if err != nil {
			t.Errorf("%+v: got %v, want nil", test, err)
			continue
		}
		if e.Capacity != test.capacity || e.Refill != test.refill || e.Per != test.per || e.Store == nil {
			t.Errorf("got %+v, want %+v and a store", e, test)
		}
		e.Store.Close()
	}
}

// TestRateIsExact compares the rates of random decimals with rational arithmetic.
func TestRateIsExact(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	setenv(t, "", "10", "")
	for range 2000 {
		text := big.NewInt(random.Int64N(1_000_000)).String()
		if n := random.IntN(9); n > 0 {
			text += "."
			for range n {
				text += string(rune('0' + random.IntN(10)))
			}
		}
		t.Setenv("TOKEN_REFILL_RATE", text)
		want, _ := new(big.Rat).SetString(text)
		e, err := backend.FromEnv(t.Context())
		if err != nil {
			if want.Sign() != 0 {
				t.Fatalf("%s: got %v, want nil", text, err)
			}
			continue
		}
		got := big.NewRat(e.Refill, int64(e.Per/time.Second))
		if got.Cmp(want) != 0 || got.Num().Int64() != e.Refill {
			t.Fatalf("%s: got %d each %v, want %v a second", text, e.Refill, e.Per, want)
		}
		e.Store.Close()
	}
}

func TestFromEnvRefuses(t *testing.T) {
	for _, test := range []struct {
		url, size, rate string
		says            []string
	}{
		{"", "abc", "", []string{"TOKEN_BUCKET_SIZE", `"abc"`, "1 to 4503599627370495"}},
		{"", "0", "", []string{"TOKEN_BUCKET_SIZE", `"0"`}},
		{"", "-5", "", []string{"TOKEN_BUCKET_SIZE", `"-5"`}},
		{"", "+5", "", []string{"TOKEN_BUCKET_SIZE", `"+5"`}},
		{"", " 5", "", []string{"TOKEN_BUCKET_SIZE", `" 5"`}},
		{"", "1_000", "", []string{"TOKEN_BUCKET_SIZE"}},
		{"", "10.0", "", []string{"TOKEN_BUCKET_SIZE"}},
		{"", "1099511627777", "", []string{"TOKEN_BUCKET_SIZE"}},
		{"", "99999999999999999999", "", []string{"TOKEN_BUCKET_SIZE"}},
		{"", strings.Repeat("x", 1000), "", []string{"TOKEN_BUCKET_SIZE", "…"}},
		{"", "", "abc", []string{"TOKEN_REFILL_RATE", `"abc"`, "10.5"}},
		{"", "", "0", []string{"TOKEN_REFILL_RATE"}},
		{"", "", "0.0", []string{"TOKEN_REFILL_RATE"}},
		{"", "", "-1", []string{"TOKEN_REFILL_RATE"}},
		{"", "", "1e3", []string{"TOKEN_REFILL_RATE"}},
		{"", "", "NaN", []string{"TOKEN_REFILL_RATE"}},
		{"", "", "Inf", []string{"TOKEN_REFILL_RATE"}},
		{"", "", "10,5", []string{"TOKEN_REFILL_RATE"}},
		{"", "", "10.", []string{"TOKEN_REFILL_RATE"}},
		{"", "", ".5", []string{"TOKEN_REFILL_RATE"}},
		{"", "", "1.2.3", []string{"TOKEN_REFILL_RATE"}},
		{"", "", "0.000000001", []string{"TOKEN_REFILL_RATE", "8 digits"}},
		{"", "", "1000000000.1", []string{"TOKEN_REFILL_RATE is"}},
		{"", "", "99999999999999999999999", []string{"TOKEN_REFILL_RATE"}},
		{"", "1000", "0.00000001", []string{"TOKEN_BUCKET_SIZE", "TOKEN_REFILL_RATE", "ten years"}},
		{"redis://:secret@host", "", "", []string{"REDIS_URL", "import _"}},
		{":secret@host:6379", "", "", []string{"REDIS_URL", "scheme"}},
		{"redis://:sec%ret@host", "", "", []string{"REDIS_URL"}},
		{"redis://:secret@host:x", "", "", []string{"REDIS_URL"}},
	} {
		setenv(t, test.url, test.size, test.rate)
		e, err := backend.FromEnv(t.Context())
		if !errors.Is(err, quota.ErrInvalid) || e.Store != nil {
			t.Errorf("%+v: got %v, want ErrInvalid and no store", test, err)
			continue
		}
		for _, s := range test.says {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%+v: got %v, want it to say %q", test, err, s)
			}
		}
		if len(err.Error()) > 500 || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "sec%ret") || strings.Contains(err.Error(), "host") && test.url != "" && !strings.Contains(err.Error(), "user:password@host:port") {
			t.Errorf("%+v: got %v, want 500 bytes at most, without the URL's host and password", test, err)
		}
	}
}
